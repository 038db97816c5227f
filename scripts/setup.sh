#!/usr/bin/env bash
# Creates .venv with imagevec and everything that its demo, tests and benchmarks need.
# Does nothing if nothing has changed since the last run. SETUP_PYTHON names a Python to use.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

# The constraints apply to Python 3.11 and newer, so 3.10 is the last choice.
best_python() {
    local python
    for python in ${SETUP_PYTHON:-python3.13 python3.12 python3.11 python3 python3.14 python3.10}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    fail "imagevec needs Python 3.10 or newer: install it, for example as python3.12, or set SETUP_PYTHON"
}

# Debian packages ensurepip, which venv needs, separately.
require_ensurepip() {
    "$1" -c 'import ensurepip' 2>/dev/null && return
    local package
    package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "$1 cannot create virtual environments: install the package $package"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
}

stamp=.venv/.installed
fingerprint="$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
    exit 0
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(best_python)"
    require_ensurepip "$python"
    echo "setup: creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

constraints=(--constraint constraints.txt)
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    constraints=()
fi
echo "setup: installing packages (takes several minutes the first time)"
# pip 25.1 introduced --group; pip before 23.3 does not recognise the extra pandas_on_spark.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --quiet ${constraints[@]+"${constraints[@]}"} \
    --group dev --editable '.[spark,heif,timm,clip,transformers,openvino,quantize,connect,fsspec,search,demo,bench,docs]'
echo "$fingerprint" >"$stamp"
