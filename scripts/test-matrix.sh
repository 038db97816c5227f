#!/usr/bin/env bash
# Runs the Spark tests on the oldest and newest PySpark of each supported line, each with the pandas
# and PyArrow of its time. These overlay .venv, so that all of them share its PyTorch (6 GB).
#
#   scripts/test-matrix.sh [NAME...]      # all, or some: 3.5-oldest 3.5-newest 4-oldest 4-newest
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A overlays=(
    [3.5-oldest]='pyspark[pandas_on_spark]==3.5.0 pandas==2.2.2 pyarrow==15.0.2 numpy==1.26.4'
    [3.5-newest]='pyspark[pandas_on_spark]<4 pandas==2.2.3 pyarrow==18.1.0 numpy==1.26.4'
    [4-oldest]='pyspark[pandas_on_spark]==4.0.0 pandas==2.2.3 pyarrow==18.1.0 numpy==2.1.3'
    [4-newest]=''
)
of_tables=(tests/table/test_{provenance,sources,extract,dest,webdataset}.py tests/search/test_{joins,components}.py)
names=("$@")
if [ "${#names[@]}" = 0 ]; then
    names=(3.5-oldest 3.5-newest 4-oldest 4-newest)
fi

failed=()
for name in "${names[@]}"; do
    folder=".cache/matrix/$name"
    read -ra packages <<<"${overlays[$name]}"
    if [ "${#packages[@]}" -gt 0 ] && [ ! -f "$folder/.installed" ]; then
        rm -rf "$folder"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --target "$folder" "${packages[@]}" 2>/dev/null
        touch "$folder/.installed"
    fi
    echo "== $name: $(PYTHONPATH="$folder" .venv/bin/python -c '
import numpy, pandas, pyarrow, pyspark
print(*(f"{m.__name__} {m.__version__}" for m in (pyspark, pandas, pyarrow, numpy)), sep=", ")')"
    PYTHONPATH="$PWD/$folder" .venv/bin/python -m pytest -q -W ignore tests/spark "${of_tables[@]}" || failed+=("$name")
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
