#!/usr/bin/env bash
# Builds the sdist and the wheel into dist/, and then uses the wheel as its users will: with PySpark
# and no other extra, in an environment of its own, in a folder outside the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
repository="$PWD"

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "release-check: python3 must be Python 3.11 or newer, as constraints.txt is" >&2
    exit 1
fi

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
export TMPDIR="$folder" XDG_CACHE_HOME="$folder/cache" SPARK_LOCAL_IP=127.0.0.1
export PYSPARK_PYTHON="$folder/user/bin/python" PYSPARK_DRIVER_PYTHON="$folder/user/bin/python"

make_environment() { # NAME, and what to install
    python3 -m venv "$folder/$1"
    local pip=("$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" --upgrade 'pip>=25.1' # the first with --group
    "${pip[@]}" --constraint "$repository/constraints.txt" "${@:2}"
}

echo "== build"
make_environment tools --group release
rm -rf dist
"$folder/tools/bin/python" -m build --outdir dist # the wheel is built from the sdist
"$folder/tools/bin/python" -m twine check --strict dist/*

echo "== the wheel has every file of the package"
diff <(git ls-files imagevec | sort) \
    <(python3 -m zipfile --list dist/*.whl | awk '/^imagevec\// { print $1 }' | sort)

echo "== install the wheel, which takes some minutes"
make_environment user "$(echo "$repository"/dist/*.whl)[spark]"
cd "$folder"

echo "== imagevec --version"
user/bin/imagevec --version

echo "== imagevec models --search resnet18"
user/bin/imagevec models --search resnet18

echo "== the first example of README.md, with random weights"
mkdir photos
user/bin/python - "$repository/README.md" <<'END'
import re
import sys
from pathlib import Path

from PIL import Image
from pyspark.sql import SparkSession

Image.linear_gradient("L").convert("RGB").save("photos/gradient.png")
(example, *_) = re.findall("```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
example = example.replace('features_udf("content")', 'features_udf("content", weights="random")')
with SparkSession.builder.master("local[1]").getOrCreate() as spark:
    names = {"spark": spark}
    exec(example, names)
    (row,) = names["vectors"].collect()
assert len(row.features) == 2048 and max(row.features) > 0, row
print(f"{Path(row.path).name}: {len(row.features):,} floats")
END
