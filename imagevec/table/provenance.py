"""Where a column of features comes from: its ``FeatureSpec``, in the column's metadata.

Spark keeps a column's metadata through ``withColumn``, ``select`` and Parquet.
"""

from __future__ import annotations

import json
from typing import Any

from pyspark.sql import DataFrame

import imagevec
from imagevec.errors import FingerprintError, OptionError, did_you_mean
from imagevec.spec import FeatureSpec

KEY = "imagevec"


def metadata_of(spec: FeatureSpec) -> dict[str, Any]:
    """The metadata of a column of such features."""
    provenance = json.loads(spec.to_json())
    provenance |= {"fingerprint": spec.fingerprint, "imagevec": imagevec.__version__}
    return {KEY: provenance}


def fingerprint(df: DataFrame, column: str = "features") -> dict[str, Any]:
    """What made a column of features.

    Returns:
        ``fingerprint`` (equal for two columns if and only if their vectors are comparable),
        ``model``, ``weights`` (a SHA-256), ``layer``, ``num_features``, ``preprocessing``,
        ``precision``, ``normalize``, and ``imagevec``, the version.

    Raises:
        OptionError: There is no such column.
        FingerprintError: The column does not say: ``features_udf`` did not make it, or its metadata
            was lost on the way. A UDF that was registered for SQL cannot pass any on.
    """
    if column not in df.columns:
        raise OptionError(f"there is no column {column!r}: {did_you_mean(column, df.columns)}")
    provenance: dict[str, Any] | None = df.schema[column].metadata.get(KEY)
    if provenance is None:
        raise FingerprintError(f"column {column!r} does not say what made its features")
    return provenance


def check_fingerprints(first: DataFrame, second: DataFrame, column: str = "features") -> None:
    """Before features are compared or put together: nothing, if they are of the same fingerprint.

    Raises:
        FingerprintError: They are not; the message says what differs.
    """
    check_same(fingerprint(first, column), fingerprint(second, column))


def check_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """``check_fingerprints`` for what ``fingerprint`` returned."""
    if first["fingerprint"] == second["fingerprint"]:
        return
    names = sorted((first.keys() | second.keys()) - {"fingerprint", "imagevec"})
    differing = [
        f"{name} {first.get(name)!r} and {second.get(name)!r}"
        for name in names
        if first.get(name) != second.get(name)
    ]
    raise FingerprintError(f"the features are not comparable: {'; '.join(differing)}")
