"""Assigns vectors to the cells of a k-means clustering, to find near ones without the others.

No vector is moved: cells are lists of row numbers of a ``VectorFile``.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from imagevec.errors import FingerprintError, MissingExtraError
from imagevec.search.neighbours import (
    Indices,
    Vectors,
    link_near,
    nearest_units,
    rank_in_row,
    unit_vectors,
)
from imagevec.search.vectors import VectorFile, brought
from imagevec.search.workspace import Workspace
from imagevec.spark.sessions import failures_in_words
from imagevec.spark.ship import shipped

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
_LISTED_VALUES = 1 << 20  # of a table of cells at a time
_RECEIVED_BYTES = 1 << 26  # per partition that the driver receives


@dataclass(frozen=True)
class Cells:
    """The cells, as a worker needs them.

    Attributes:
        files: The names of the shipped files of ``arrays``.
        probes: The number of cells that a query is compared with.
        tasks: Ranges of cells with about the same amount of work.
    """

    files: dict[str, str]
    probes: int
    tasks: list[tuple[int, int]]

    def arrays(self) -> dict[str, Any]:
        """Returns the arrays, mapped from their files.

        They are ``centroids``, float32 ``(C, D)``; ``rows`` of the ``VectorFile``, cell by cell,
        and where each cell ``begins`` in them; the same for ``visitors`` from nearby cells.
        """
        return {array: _mapped(shipped(name)) for array, name in self.files.items()}


def _mapped(path: Path) -> Any:
    return np.asarray(np.load(path, mmap_mode="r"))


def cells_for_queries(
    space: Workspace,
    queries: tuple[DataFrame, int] | None,
    vectors: VectorFile,
    k: int,
    recall: float,
) -> tuple[Cells, float]:
    """Returns cells, and the share of true neighbours found for a sample of the queries.

    The queries are a data frame of ``keyed`` with its number of rows, or ``None`` for the vectors.

    Raises:
        FingerprintError: A query of the sample and the vectors differ in length.
    """
    if queries is None:
        units = _sample(vectors, _SAMPLE, space)
    else:
        units = _sample_of(*queries, vectors.features)
    centroids = _centroids(vectors, space)
    name = _ship_array("centroids", centroids, space)
    home = _nearest_cells(vectors, name, 1, space)
    if not len(units):  # no query has a vector
        return _shipped(name, home, len(centroids), 1, space), 1.0
    true, _ = nearest_units(units, vectors.units(space), k)  # (S, k)
    # The position of each true neighbour's cell among the query's cells.
    most = min(_MAX_PROBES, len(centroids))
    order, _ = nearest_units(units, centroids, most)  # (S, P)
    is_home = order[:, None, :] == home[:, 0][true][:, :, None]  # (S, k, P)
    place = np.where(is_home.any(2), is_home.argmax(2), most)
    probes, reached = _probes(place, most, recall)
    logger.info("%d cells, %d compared per query: recall %.3f", len(centroids), probes, reached)
    return _shipped(name, home, len(centroids), probes, space), reached


def _sample(vectors: VectorFile, count: int, space: Workspace) -> Vectors:
    rows = np.random.default_rng(0).choice(
        vectors.rows, min(vectors.rows, count), replace=False, shuffle=False
    )
    return np.array(vectors.units(space)[np.sort(rows)])


def _sample_of(queries: DataFrame, count: int, features: int) -> Vectors:
    """Samples queries by their keys, so that the sample does not depend on partitioning."""
    every = max(1, count // _SAMPLE)
    chosen = queries.where(F.pmod(F.xxhash64("key"), F.lit(every)) == 0).select("vector")
    with failures_in_words():
        rows = [row["vector"] for row in chosen.collect() if row["vector"] is not None]
    for length in {len(row) for row in rows} - {features}:
        raise FingerprintError(
            f"vectors of {length} and of {features} features are not comparable: use one model"
        )
    return unit_vectors(np.array(rows, np.float32).reshape(len(rows), features))


def cells_for_pairs(space: Workspace, vectors: VectorFile, min_cosine: float) -> Cells:
    """Returns cells with visitors: vectors that are also compared with cells near their own."""
    if vectors.rows == 0:
        return Cells({}, 1, [])
    centroids = _centroids(vectors, space)
    # Rotates vectors by the largest angle between near-duplicates, in random directions.
    chance = np.random.default_rng(0)
    units = _sample(vectors, 8 * _SAMPLE, space)
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
    name = _ship_array("centroids", centroids, space)
    home = _nearest_cells(vectors, name, probes, space)
    return _shipped(name, home, len(centroids), probes, space)


def _probes(place: Any, most: int, recall: float) -> tuple[int, float]:
    """Returns the smallest number of cells that reaches the recall, and their recall."""
    reached = np.searchsorted(np.sort(place, axis=None), np.arange(1, most + 1)) / place.size
    probes = min(most, int(np.searchsorted(reached, recall)) + 1)
    return probes, float(reached[probes - 1])


def _centroids(vectors: VectorFile, space: Workspace) -> Vectors:
    """Returns centroids of length 1, float32 ``(C, D)``, computed on a sample."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "search") from error
    count = max(1, min(_MAX_CELLS, 2 * math.isqrt(vectors.rows)))
    sample = _sample(vectors, count * _VECTORS_A_CENTROID, space)
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


def _nearest_cells(vectors: VectorFile, name: str, count: int, space: Workspace) -> Any:
    """Returns the ``count`` nearest cells of each vector, int32 ``(N, count)``, by all workers."""
    tasks = math.ceil(vectors.rows / _ASSIGNED_ROWS)
    assigned = space.session.range(0, tasks, 1, tasks).mapInArrow(
        functools.partial(_assigned, vectors=vectors, name=name, count=count),
        "first long, cells binary",
    )
    cells = _new_array(space.folder / "cells.npy", np.int32, (vectors.rows, count))
    # Spark computes all parts before the first one arrives; then they arrive one by one.
    parts = assigned.repartition(max(1, cells.nbytes // _RECEIVED_BYTES))
    with failures_in_words():
        for first, content in brought(parts):
            part = np.frombuffer(content, np.int32).reshape(-1, count)
            cells[first : first + len(part)] = part
    return cells


def _assigned(
    batches: Iterator[pa.RecordBatch], vectors: VectorFile, name: str, count: int
) -> Iterator[pa.RecordBatch]:
    centroids = _mapped(shipped(name))
    for batch in batches:
        for task in batch.column(0).to_pylist():
            first = task * _ASSIGNED_ROWS
            units = vectors.units()[first : first + _ASSIGNED_ROWS]
            cells, _ = nearest_units(units, centroids, count)
            columns = [pa.array([first]), pa.array([cells.astype(np.int32).tobytes()])]
            yield pa.RecordBatch.from_arrays(columns, ["first", "cells"])


def _shipped(name: str, cells: Any, count: int, probes: int, space: Workspace) -> Cells:
    """Ships the lists of ``count`` cells.

    Args:
        name: The name of the shipped file of centroids.
        cells: The nearest cells of each vector, nearest first, int32 ``(N, P)``.
        count: The number of cells.
        probes: See ``Cells``.
        space: The workspace of the search.
    """
    files, begins = {"centroids": name}, []
    # A vector is a member of its nearest cell, and visits the others.
    for array, offsets, part in (
        ("rows", "begins", cells[:, :1]),
        ("visitors", "visits_begin", cells[:, 1:]),
    ):
        path = space.folder / f"{array}.npy"
        begins.append(_list_rows(part, count, _new_array(path, _row_type(part), (part.size,))))
        files[array] = space.ship(path)
        files[offsets] = _ship_array(offsets, begins[-1], space)
    # The work of a cell depends on the number of its members and visitors.
    work = begins[0] + begins[1]
    cuts = np.searchsorted(work, np.arange(0, work[-1], _TASK_VECTORS))
    cuts = np.unique(np.append(cuts, count)).tolist()
    return Cells(files, probes, list(zip(cuts[:-1], cuts[1:], strict=True)))


def _row_type(cells: Any) -> Any:
    return np.int32 if len(cells) <= np.iinfo(np.int32).max else np.int64


def _list_rows(cells: Any, count: int, out: Any) -> Any:
    """Lists the rows of each cell in ``out``, cell by cell, each cell's rows ascending.

    Args:
        cells: Cells of each row, integers ``(N, P)``, possibly mapped from a file.
        count: The number of cells.
        out: An array of N * P row numbers to fill.

    Returns:
        Where each cell begins in ``out``, and the end, int64 ``(count + 1,)``.
    """
    step = max(1, _LISTED_VALUES // max(1, cells.shape[1]))
    blocks = [slice(begin, begin + step) for begin in range(0, len(cells), step)]
    begins = np.zeros(count + 1, np.int64)
    for rows in blocks:
        begins[1:] += np.bincount(cells[rows].ravel(), minlength=count)
    np.cumsum(begins, out=begins)
    following = begins[:-1].copy()
    for rows in blocks:
        cell = cells[rows].ravel()
        order = np.argsort(cell, kind="stable")
        cell = cell[order]
        out[following[cell] + rank_in_row(cell)] = rows.start + order // max(1, cells.shape[1])
        following += np.bincount(cell, minlength=count)
    return begins


def _new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Returns a new array, mapped from a ``.npy`` file."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # else writing to it on a full disk would kill the process
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _ship_array(name: str, array: Any, space: Workspace) -> str:
    path = space.folder / f"{name}.npy"
    np.save(path, array)
    return space.ship(path)


def nearest_in_cells(
    queries: Vectors, units: Vectors, cells: Cells, k: int
) -> tuple[Indices, Indices, Vectors]:
    """Compares queries with the vectors of their nearest cells, on a worker.

    Returns:
        Query rows, vector indices and cosines, in the order of the result.
    """
    arrays = cells.arrays()
    asked, _ = nearest_units(queries, arrays["centroids"], cells.probes)  # (B, P)
    visiting = np.empty(asked.size, np.int64)
    begins = _list_rows(asked, len(arrays["centroids"]), visiting)
    parts = [_found_among(queries, visiting[:0], units, None, k)]  # all cells may be empty
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
