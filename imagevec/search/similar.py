"""Finds the images of a table that are nearest to queries, and streams the table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from imagevec.errors import FingerprintError
from imagevec.images.parallel import map_ahead
from imagevec.models.registry import find_source, named
from imagevec.models.weights import option_of
from imagevec.options import RANDOM, Options, check_positive
from imagevec.search.neighbours import Vectors, nearest
from imagevec.spec import DECODING, Preprocessing
from imagevec.storage.location import Location
from imagevec.table.read import RowGroup, column_metadata, read_paths, read_vectors

if TYPE_CHECKING:
    from imagevec.table.provenance import Provenance


def similar(
    features: str,
    queries: Sequence[str],
    k: int,
    model: str | None = None,
    weights: str | None = None,
    texts: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Finds the ``k`` nearest images to each query, by cosine.

    If a query is not in the table, or has no features there, its vector is computed with the
    table's model. The table records the model, but a file or folder must be passed as ``model``. A
    query that is in the table is not its own neighbour.

    Args:
        features: The folder that ``imagevec extract`` wrote, or its URI.
        queries: Paths or URIs of images.
        k: The number of neighbours, at least 1. If the table has fewer, all are returned.
        model: The file or folder of the model that the table was made with, if any.
        weights: The weights that the table was made with, if they are not in the cache.
        texts: Descriptions of images. The features must come from a model with a text
            encoder, such as CLIP.

    Returns:
        For each query, and then for each text,
        ``{"query": ..., "neighbours": [{"path": ..., "cosine": ...}, ...]}``. Neighbours are sorted
        by descending cosine, and then by path.

    Raises:
        OptionError: The table cannot be read or has no features, ``k`` is below 1, or ``model`` is
            required.
        FingerprintError: The model is not the table's, or the table has no provenance.
        ImageError: A query is not in the table, and cannot be read or is not an image.
    """
    k = check_positive("k", k)
    names = [str(Location.of(query)) for query in queries]
    own, row_groups = _rows_of(features, set(names)) if names else ({}, set())
    vectors = _vectors_there(features, own, row_groups)
    missing = {n: query for n, query in zip(names, queries, strict=True) if n not in vectors}
    if missing:
        vectors |= _vectors_computed(features, missing, model, weights)
    query_vectors = [vectors[name] for name in names]  # (D,) each
    query_vectors += _vectors_of_texts(features, texts, model, weights) if texts else []
    paths_to_skip = [own[name] for name in names] + [[] for _ in texts]
    found = _nearest(features, np.stack(query_vectors), k, paths_to_skip)
    return [
        {
            "query": query,
            "neighbours": [
                {"path": path, "cosine": round(-negative, 6)} for negative, path in neighbours
            ],
        }
        for query, neighbours in zip([*queries, *texts], found, strict=True)
    ]


def _nearest(
    features: str, queries: Vectors, k: int, own: list[list[str]]
) -> list[list[tuple[float, str]]]:
    """Returns the ``k`` neighbours of each query, in order: negative cosines and paths.

    Args:
        features: The table.
        queries: float32 ``(Q, D)``.
        k: The number of neighbours, at least 1.
        own: The paths of each query's own rows, which are excluded.
    """
    best: list[list[tuple[float, str]]] = [[] for _ in queries]
    compare = functools.partial(_nearest_of_block, queries=queries, k=k + max(map(len, own)))
    # A thread compares while this one reads.
    for found in map_ahead(compare, read_vectors(features), threads=1, ahead=1):
        for row, new in enumerate(found):
            others = [(negative, path) for negative, path in new if path not in own[row]]
            best[row] = sorted(best[row] + others)[:k]
    return best


def _nearest_of_block(
    block: tuple[list[str], Vectors], queries: Vectors, k: int
) -> list[list[tuple[float, str]]]:
    paths, vectors = block
    order = sorted(range(len(paths)), key=paths.__getitem__)  # ties go to the lower index
    indices, cosines = nearest(queries, vectors[order], k)
    return [
        [(negative, paths[order[index]]) for negative, index in zip(*row, strict=True)]
        for row in zip((-cosines).tolist(), indices.tolist(), strict=True)
    ]


def _rows_of(features: str, names: set[str]) -> tuple[dict[str, list[str]], set[RowGroup]]:
    """Finds the rows of images by path.

    Returns:
        For each name its paths in the table, and the row groups that contain any of them.
    """
    own: dict[str, list[str]] = {name: [] for name in names}
    row_groups = set()
    ends = {name.rpartition("/")[2] for name in names}
    for row_group, paths in read_paths(features):
        for path in paths:
            if path.rpartition("/")[2] in ends and (name := str(Location.of(path))) in own:
                own[name].append(path)
                row_groups.add(row_group)
    return own, row_groups


def _vectors_there(
    features: str, own: dict[str, list[str]], row_groups: set[RowGroup]
) -> dict[str, Vectors]:
    """Returns the vectors that the table has for these images, by name."""
    found: dict[str, Vectors] = {}
    if row_groups:
        name_of = {path: name for name, paths in own.items() for path in paths}
        for paths, block in read_vectors(features, row_groups):
            for path, vector in zip(paths, block, strict=True):
                if path in name_of:
                    found.setdefault(name_of[path], vector.copy())
    return found


def _vectors_computed(
    features: str, queries: dict[str, str], model: str | None, weights: str | None
) -> dict[str, Vectors]:
    """Computes the vectors of images that are not in the table, by name like ``queries``."""
    from imagevec.spark.vectorizer import ImageVectorizer
    from imagevec.table.provenance import Provenance, check_same

    made_of = _provenance_of(features)
    options: dict[str, Any] = {
        "layer": made_of.layer,
        "normalize": made_of.normalize,
        "precision": made_of.precision,
        "on_error": "raise",
    }
    if isinstance(made_of.preprocessing, Preprocessing):
        options |= {name: getattr(made_of.preprocessing, name) for name in DECODING}
        options["input_size"] = made_of.preprocessing.input_size
    options |= _model_options(made_of, features, model, weights)
    vectorizer = ImageVectorizer(**cast(Options, options))
    check_same(made_of, Provenance.of(vectorizer.spec))
    return {
        name: np.array(vectorizer.extract_features(query), np.float32)
        for name, query in queries.items()
    }


def _vectors_of_texts(
    features: str, texts: Sequence[str], model: str | None, weights: str | None
) -> list[Vectors]:
    """Computes the vectors of texts, in order, with the text tower of the table's model."""
    from imagevec.spark.text import text_features, text_plan
    from imagevec.table.provenance import Provenance, check_same

    made_of = _provenance_of(features)
    options: Any = _model_options(made_of, features, model, weights)
    check_same(made_of, Provenance.of(text_plan(**options).spec))
    return list(text_features(texts, **options))


def _provenance_of(features: str) -> Provenance:
    from imagevec.table.provenance import Provenance

    metadata = column_metadata(features, "features")
    if not metadata:
        raise FingerprintError(f"{features} has no provenance in its metadata")
    return Provenance.of_metadata(metadata)


def _model_options(
    made_of: Provenance, features: str, model: str | None, weights: str | None
) -> dict[str, str]:
    """Returns the options ``model`` and ``weights`` of the table, or those that are given."""
    if model is None:
        model = named(made_of.model, made_of.precision, features)
        if made_of.weights == RANDOM or not find_source(model).contains_weights:
            weights = weights or option_of(made_of.model, made_of.weights)
    return {"model": model, "weights": weights} if weights else {"model": model}
