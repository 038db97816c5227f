"""The images of a table that are nearest to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from imagevec.cache import find
from imagevec.errors import FingerprintError, OptionError
from imagevec.options import Options
from imagevec.search.neighbours import nearest
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.table.provenance import Provenance, check_same
from imagevec.table.read import read_features

_SPARK_SCHEMA = b"org.apache.spark.sql.parquet.row.metadata"


def similar(
    features: str, query: str, k: int, model: str | None = None, weights: str | None = None
) -> list[dict[str, Any]]:
    """The ``k`` nearest images, each a path and its cosine to the query, the nearest first.

    A query that is not in the table is computed here, with the model that its features are of. Its
    name is in the table, but a saved model or a ``.pt2`` file has to be given again.

    Raises:
        OptionError: The table or the query cannot be read, or the model has to be given.
        FingerprintError: The model that is at hand is not the one of the table.
    """
    paths, vectors = read_features(features)
    wanted = [path for path in paths if _plain(path) == _plain(query)]
    if wanted:
        vector = vectors[paths.index(wanted[0])]
    else:
        vector = _vector(_provenance(features), query, model, weights)
    others = [i for i, path in enumerate(paths) if path not in wanted]
    indices, cosines = nearest(vector[None], vectors[others], min(k, len(others)))
    return [
        {"path": paths[others[index]], "cosine": round(float(cosine), 6)}
        for index, cosine in zip(indices[0], cosines[0], strict=True)
    ]


def _vector(
    made_of: Provenance, query: str, model: str | None, weights: str | None
) -> npt.NDArray[np.float32]:
    options: dict[str, Any] = {
        "layer": made_of.layer,
        "normalize": made_of.normalize,
        "precision": made_of.precision,
        "decode": made_of.preprocessing.decode,
        "on_error": "raise",
    }
    if model is None:
        name = made_of.model
        if made_of.precision == "int8" or name.startswith("pt2:"):
            raise OptionError(f"the features are of {name!r}, a folder or file: give it as --model")
        options |= {"model": name, "weights": weights or _weights_at_hand(made_of)}
    else:
        options |= {"model": model, "weights": weights} if weights else {"model": model}
    vectorizer = ImageVectorizer(**cast(Options, options))
    check_same(made_of, Provenance.of(vectorizer.spec))
    return np.array(vectorizer.extract_features(query), np.float32)


def _weights_at_hand(made_of: Provenance) -> str:
    kind: str
    kind, _, digest = made_of.weights.partition(":")
    if kind == "random":
        return kind
    path = find(digest)
    return str(path) if path else "DEFAULT"


def _provenance(features: str) -> Provenance:
    """Of the table's column, without Spark, from the schema that Spark wrote into its files."""
    file = next(iter(sorted(Path(features.removeprefix("file:")).glob("*.parquet"))), None)
    if file is None:
        raise OptionError(f"{features} holds no Parquet file")
    metadata = pq.read_schema(file).metadata or {}
    fields = json.loads(metadata.get(_SPARK_SCHEMA, b'{"fields": []}'))["fields"]
    for field in fields:
        if field["name"] == "features" and field["metadata"]:
            return Provenance.of_metadata(field["metadata"])
    raise FingerprintError(f"{features} does not say what made its features")


def _plain(path: str) -> str:
    """A local path or ``file:`` URI as an absolute path; other URIs as they are."""
    if path.startswith("file:"):
        return "/" + path.removeprefix("file:").lstrip("/")
    return path if "://" in path else str(Path(path).absolute())
