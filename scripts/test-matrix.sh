#!/usr/bin/env bash
# Runs the tests with other versions of the dependencies. Each leg has an environment of its own on top
# of .venv, so that all of them share its PyTorch (6 GB).
#
#   scripts/test-matrix.sh [NAME...]      # all, or some: lowest 3.5-newest 4-oldest 4-newest
set -euo pipefail
cd "$(dirname "$0")/.."

# What pyproject.toml states as the lowest, with PySpark 3.5.0; but for PyTorch, which is that of .venv.
lowest="$(.venv/bin/python - <<'END'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
of_users = ("spark", "timm", "clip", "transformers", "openvino", "quantize", "connect", "fsspec", "search")
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + [line for name in of_users for line in extras[name]]:
    name, version = re.match(r"(.+?)>=([\d.]+)", requirement).groups()
    if name not in ("torch", "torchvision"):
        print(f"{name}=={version}")
END
)"
declare -A packages=(
    [lowest]="$lowest"
    [3.5-newest]='pyspark[pandas_on_spark]<4 pandas==2.2.3 pyarrow==18.1.0 numpy==1.26.4'
    [4-oldest]='pyspark[pandas_on_spark]==4.0.0 pandas==2.2.3 pyarrow==18.1.0 numpy==2.1.3'
    [4-newest]=''
)
of_spark=(tests/spark tests/table/test_{provenance,sources,extract,dest,webdataset}.py
    tests/search/test_{joins,components}.py)
declare -A tests=(
    [lowest]='tests'
    [3.5-newest]="${of_spark[*]}"
    [4-oldest]="${of_spark[*]}"
    [4-newest]="${of_spark[*]}"
)
names=("$@")
if [ "${#names[@]}" = 0 ]; then
    names=(lowest 3.5-newest 4-oldest 4-newest)
fi

site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

failed=()
for name in "${names[@]}"; do
    folder=".cache/matrix/$name"
    python="$PWD/$folder/bin/python"
    if [ ! -f "$folder/.installed" ] || [ "$(cat "$folder/.installed")" != "${packages[$name]}" ]; then
        .venv/bin/python -m venv --clear --without-pip "$folder"
        site_packages .venv/bin/python >"$(site_packages "$python")/base.pth" # pip is there, too
        [ -z "${packages[$name]}" ] || "$python" -m pip install --quiet \
            --disable-pip-version-check ${packages[$name]}
        echo "${packages[$name]}" >"$folder/.installed"
    fi
    echo "== $name: $("$python" -c '
import numpy, pandas, pyarrow, pyspark
print(*(f"{m.__name__} {m.__version__}" for m in (pyspark, pandas, pyarrow, numpy)), sep=", ")')"
    "$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -W ignore ${tests[$name]} || failed+=("$name")
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
