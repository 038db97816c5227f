#!/usr/bin/env bash
# Makes .venv, with imagevec and all that its demo, tests and benchmarks need.
# Quick when nothing changed since the last run. SETUP_PYTHON names a Python other than the newest.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

# The constraints are of Python 3.11 and newer: 3.10 is the last choice.
best_python() {
    local python
    for python in ${SETUP_PYTHON:-python3.13 python3.12 python3.11 python3 python3.14 python3.10}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    fail "Python 3.10 or newer is needed: install it, for example as python3.12, or set SETUP_PYTHON"
}

# Debian splits what venv needs from its Python.
require_ensurepip() {
    "$1" -c 'import ensurepip' 2>/dev/null && return
    local package
    package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "$1 cannot make virtual environments: install the package $package"
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
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

constraints=(--constraint constraints.txt)
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    constraints=()
fi
echo "setup: installing, which takes some minutes the first time"
# pip 25.1 is the first with --group; before 23.3 it does not know the extra pandas_on_spark.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --quiet ${constraints[@]+"${constraints[@]}"} \
    --group dev --editable '.[timm,openvino,quantize,connect,fsspec,search,demo,bench,docs]'
echo "$fingerprint" >"$stamp"
