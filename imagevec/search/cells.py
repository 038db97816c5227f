"""Assigns vectors to the cells of a k-means clustering, to find near ones without the others.

No vector is moved: cells are lists of row numbers of a ``VectorFile``.
"""

from __future__ import annotations

import functools
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec.errors import MissingExtraError
from imagevec.search.neighbours import (
    Indices,
    Vectors,
    link_near,
    nearest_units,
    rank_in_row,
    unit_vectors,
)
from imagevec.search.vectors import VectorFile, folder, write_bytes
from imagevec.spark.sessions import failures_in_words
from imagevec.spark.ship import ship_file, shipped

logger = logging.getLogger(__name__)

_MAX_CELLS = 16_384
_VECTORS_A_CENTROID = 64  # in the sample for k-means: faiss asks for at least 39
_ITERATIONS = 10
_SAMPLE = 512  # queries or pairs, to choose how many cells to compare
_PAIR_RECALL = 0.995  # on the sample of pairs
_MAX_PROBES = 256
_ASSIGNED_ROWS = 1 << 14
_TASK_VECTORS = 1 << 15  # per task that compares the vectors of some cells
_MEMBER_ROWS = 1 << 14  # of a cell at a time


@dataclass(frozen=True)
class Cells:
    """The cells, as a worker needs them.

    Attributes:
        name: The name of the shipped file with the arrays.
        probes: The number of cells that a query is compared with.
        tasks: Ranges of cells with about the same amount of work.
    """

    name: str
    probes: int
    tasks: list[tuple[int, int]]

    def arrays(self) -> dict[str, Any]:
        """Returns ``centroids``, float32 ``(C, D)``; ``rows`` of the ``VectorFile``, cell by cell,
        and where each cell ``begins`` in them; the same for ``visitors`` from nearby cells."""
        return _arrays(self.name)


@functools.lru_cache(maxsize=1)
def _arrays(name: str) -> dict[str, Any]:
    with np.load(shipped(name)) as arrays:
        return dict(arrays)


def cells_for_queries(
    session: SparkSession,
    queries: tuple[DataFrame, int] | None,
    vectors: VectorFile,
    k: int,
    recall: float,
) -> tuple[Cells, float]:
    """Returns cells, and the share of true neighbours found for a sample of the queries.

    The queries are a data frame of ``keyed`` with its number of rows, or ``None`` for the vectors.
    """
    centroids = _centroids(vectors)
    home = _nearest_cells(session, vectors, centroids, 1)
    units = _sample(vectors, _SAMPLE) if queries is None else _sample_of(*queries)
    if not len(units):  # no query has a vector
        return _shipped(session, vectors, centroids, home, 1), 1.0
    true, _ = nearest_units(units, vectors.units(folder()), k)  # (S, k)
    # The position of each true neighbour's cell among the query's cells.
    most = min(_MAX_PROBES, len(centroids))
    order, _ = nearest_units(units, centroids, most)  # (S, P)
    is_home = order[:, None, :] == home[:, 0][true][:, :, None]  # (S, k, P)
    place = np.where(is_home.any(2), is_home.argmax(2), most)
    probes, reached = _probes(place, most, recall)
    logger.info("%d cells, %d compared per query: recall %.3f", len(centroids), probes, reached)
    return _shipped(session, vectors, centroids, home, probes), reached


def _sample(vectors: VectorFile, count: int) -> Vectors:
    rows = np.random.default_rng(0).choice(
        vectors.rows, min(vectors.rows, count), replace=False, shuffle=False
    )
    return np.array(vectors.units(folder())[np.sort(rows)])


def _sample_of(queries: DataFrame, count: int) -> Vectors:
    """Samples queries by their keys, so that the sample does not depend on partitioning."""
    every = max(1, count // _SAMPLE)
    chosen = queries.where(F.pmod(F.xxhash64("key"), F.lit(every)) == 0).select("vector")
    with failures_in_words():
        rows = [row["vector"] for row in chosen.collect() if row["vector"] is not None]
    return unit_vectors(np.array(rows, np.float32).reshape(len(rows), -1 if rows else 1))


def cells_for_pairs(session: SparkSession, vectors: VectorFile, min_cosine: float) -> Cells:
    """Returns cells with visitors: vectors that are also compared with cells near their own."""
    if vectors.rows == 0:
        return Cells("", 1, [])
    centroids = _centroids(vectors)
    # Rotates vectors by the largest angle between near-duplicates, in random directions.
    chance = np.random.default_rng(0)
    units = _sample(vectors, 8 * _SAMPLE)
    noise = chance.standard_normal(units.shape, np.float32)
    noise -= units * np.einsum("nd,nd->n", units, noise)[:, None]
    turned = unit_vectors(
        min_cosine * units + math.sqrt(max(0, 1 - min_cosine**2)) * unit_vectors(noise)
    )
    most = min(_MAX_PROBES, len(centroids))
    order, _ = nearest_units(units, centroids, most)
    home_of_turned, _ = nearest_units(turned, centroids, 1)
    is_home = order == home_of_turned
    place = np.where(is_home.any(1), is_home.argmax(1), most)
    probes, reached = _probes(place, most, _PAIR_RECALL)
    logger.info("%d cells, %d compared per vector: recall %.3f", len(centroids), probes, reached)
    home = _nearest_cells(session, vectors, centroids, probes)
    return _shipped(session, vectors, centroids, home, probes)


def _probes(place: Any, most: int, recall: float) -> tuple[int, float]:
    """Returns the smallest number of cells that reaches the recall, and their recall."""
    reached = np.searchsorted(np.sort(place, axis=None), np.arange(1, most + 1)) / place.size
    probes = min(most, int(np.searchsorted(reached, recall)) + 1)
    return probes, float(reached[probes - 1])


def _centroids(vectors: VectorFile) -> Vectors:
    """Returns centroids of length 1, float32 ``(C, D)``, computed on a sample."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "search") from error
    count = max(1, min(_MAX_CELLS, 2 * math.isqrt(vectors.rows)))
    sample = _sample(vectors, count * _VECTORS_A_CENTROID)
    count = min(count, len(np.unique(sample, axis=0)) if len(sample) < 10_000 else count)
    kmeans = faiss.Kmeans(
        vectors.features,
        count,
        niter=_ITERATIONS,
        spherical=True,
        seed=0,
        min_points_per_centroid=1,
        max_points_per_centroid=_VECTORS_A_CENTROID,
    )
    kmeans.train(sample)
    return unit_vectors(np.asarray(kmeans.centroids))


def _nearest_cells(
    session: SparkSession, vectors: VectorFile, centroids: Vectors, count: int
) -> Any:
    """Returns the ``count`` nearest cells of each vector, int32 ``(N, count)``, by all workers."""
    name = _write(centroids=centroids)
    ship_file(session, folder() / name)
    tasks = math.ceil(vectors.rows / _ASSIGNED_ROWS)
    assigned = session.range(0, tasks, 1, tasks).mapInArrow(
        functools.partial(_assigned, vectors=vectors, name=name, count=count),
        "first long, cells binary",
    )
    cells = np.empty((vectors.rows, count), np.int32)
    with failures_in_words():
        for first, found in assigned.collect():
            part = np.frombuffer(found, np.int32).reshape(-1, count)
            cells[first : first + len(part)] = part
    return cells


def _assigned(
    batches: Iterator[pa.RecordBatch], vectors: VectorFile, name: str, count: int
) -> Iterator[pa.RecordBatch]:
    centroids = _arrays(name)["centroids"]
    for batch in batches:
        for task in batch.column(0).to_pylist():
            first = task * _ASSIGNED_ROWS
            units = vectors.units()[first : first + _ASSIGNED_ROWS]
            cells, _ = nearest_units(units, centroids, count)
            columns = [pa.array([first]), pa.array([cells.astype(np.int32).tobytes()])]
            yield pa.RecordBatch.from_arrays(columns, ["first", "cells"])


def _shipped(
    session: SparkSession, vectors: VectorFile, centroids: Vectors, cells: Any, probes: int
) -> Cells:
    rows, begins = _listed(cells[:, 0], len(centroids))
    # A vector visits its further cells, which are listed row by row.
    visits = cells[:, 1:].ravel()
    visitors, visits_begin = _listed(visits, len(centroids))
    visitors //= max(1, cells.shape[1] - 1)
    name = _write(
        centroids=centroids,
        rows=rows,
        begins=begins,
        visitors=visitors,
        visits_begin=visits_begin,
    )
    ship_file(session, folder() / name)
    # The work of a cell depends on the number of its members and visitors.
    work = begins + visits_begin
    cuts = np.searchsorted(work, np.arange(0, work[-1], _TASK_VECTORS))
    cuts = np.unique(np.append(cuts, len(centroids))).tolist()
    return Cells(name, probes, list(zip(cuts[:-1], cuts[1:], strict=True)))


def _listed(cell: Any, count: int) -> tuple[Any, Any]:
    """Returns positions by cell, int32, and where each of ``count`` cells begins, with the end."""
    order = np.argsort(cell, kind="stable").astype(np.int32)
    return order, np.searchsorted(cell[order], np.arange(count + 1))


def _write(**arrays: Any) -> str:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return write_bytes(file.getbuffer(), "npz")


def nearest_in_cells(
    queries: Vectors, units: Vectors, cells: Cells, k: int
) -> tuple[Indices, Indices, Vectors]:
    """Compares queries with the vectors of their nearest cells, on a worker.

    Returns:
        Query rows, vector indices and cosines, in the order of the result.
    """
    arrays = cells.arrays()
    asked, _ = nearest_units(queries, arrays["centroids"], cells.probes)  # (B, P)
    visiting, begins = _listed(asked.ravel(), len(arrays["centroids"]))
    visiting //= asked.shape[1]
    parts: list[tuple[Any, Any, Any]] = []
    for cell in range(len(begins) - 1):
        here = visiting[begins[cell] : begins[cell + 1]]
        members = arrays["rows"][arrays["begins"][cell] : arrays["begins"][cell + 1]]
        if len(here) and len(members):
            parts.append(_found_among(queries, here, units, members, k))
    row, index, cosine = (np.concatenate(part) for part in zip(*parts, strict=True))
    # If the cells of a query have fewer than k vectors in total, compare it with all vectors.
    enough = np.bincount(row, minlength=len(queries)) >= min(k, len(units))
    few = np.flatnonzero(~enough)
    kept = enough[row]
    rest = _found_among(queries, few, units, None, k)
    row, index, cosine = (
        np.concatenate([part[kept], other])
        for part, other in zip((row, index, cosine), rest, strict=True)
    )
    order = np.lexsort((index, -cosine, row))
    row, index, cosine = row[order], index[order], cosine[order]
    best = rank_in_row(row) < k
    return row[best], index[best], cosine[best]


def _found_among(
    queries: Vectors, some: Any, units: Vectors, members: Any, k: int
) -> tuple[Any, Any, Any]:
    there = units if members is None else units[members]
    index, cosine = nearest_units(queries[some], there, k)
    index = index.ravel() if members is None else members[index.ravel()]
    return np.repeat(some, cosine.shape[1]), index.astype(np.int64), cosine.ravel()


def linked_in_cell(
    task: tuple[int, int], vectors: VectorFile, min_cosine: float, cells: Cells
) -> Iterator[tuple[Indices, Indices]]:
    """Compares the members of each cell with one another and its visitors, on a worker."""
    arrays = cells.arrays()
    units = vectors.units()
    for cell in range(*task):
        members = arrays["rows"][arrays["begins"][cell] : arrays["begins"][cell + 1]]
        visitors = arrays["visitors"][
            arrays["visits_begin"][cell] : arrays["visits_begin"][cell + 1]
        ]
        rows = np.concatenate([members, visitors]).astype(np.int64)
        for begin in range(0, len(members), _MEMBER_ROWS):
            # A cell with many copies may be large: its vectors are read in parts.
            some = rows[begin : begin + _MEMBER_ROWS]
            for other in range(begin, len(rows), _MEMBER_ROWS):
                beside = rows[other : other + _MEMBER_ROWS]
                pair = some if other == begin else np.concatenate([some, beside])
                below = slice(0, min(_MEMBER_ROWS, len(members) - begin))
                right = slice(0, len(pair)) if other == begin else slice(len(some), len(pair))
                root = np.arange(len(pair))
                link_near(root, units[pair], below, right, min_cosine)
                yield pair, root
