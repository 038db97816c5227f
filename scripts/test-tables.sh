#!/usr/bin/env bash
# Runs the tests of tables of a catalog, with Delta and Iceberg from Maven Central. Neither supports
# the newest PySpark, so that the tests have an environment of their own on top of .venv.
#
#   scripts/test-tables.sh [ARGUMENT...]      # arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."

folder=".cache/tables"
pyspark="pyspark==4.1.4"
python="$PWD/$folder/bin/python"

site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

if [ ! -f "$folder/.installed" ] || [ "$(cat "$folder/.installed")" != "$pyspark" ]; then
    .venv/bin/python -m venv --clear --without-pip "$folder"
    site_packages .venv/bin/python >"$(site_packages "$python")/base.pth" # pip is there, too
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$pyspark"
    echo "$pyspark" >"$folder/.installed"
fi

# One process cannot have sessions of both kinds.
failed=0
for session in classic connect; do
    echo "== $session: $pyspark"
    IMAGEVEC_SESSION="$session" "$python" -m pytest -q -n 2 -W ignore tests/tables "$@" || failed=1
done
exit "$failed"
