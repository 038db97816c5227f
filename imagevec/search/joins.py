"""Nearest neighbours and near-duplicates of data frames, on Spark."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, FloatType, IntegerType, StructField, StructType

from imagevec.errors import FingerprintError, OptionError, did_you_mean
from imagevec.options import check_positive
from imagevec.search import METHODS, Method
from imagevec.search.cells import (
    Cells,
    cells_for_pairs,
    cells_for_queries,
    linked_in_cell,
    nearest_in_cells,
)
from imagevec.search.components import components
from imagevec.search.neighbours import (
    Vectors,
    check_min_cosine,
    link_near,
    nearest_units,
    rank_in_row,
)
from imagevec.search.vectors import (
    VectorFile,
    blocks,
    collect,
    count_keys,
    keyed,
    small,
)
from imagevec.search.workspace import workspace
from imagevec.spark.sessions import existing_column, is_connect
from imagevec.spec import own_metadata
from imagevec.table.provenance import Provenance, check_same

_ROWS = 8192  # per block of streamed vectors
_QUERY_ROWS = 4096  # queries that are compared with all vectors at once
_CELL_QUERY_ROWS = 1 << 14  # the same with cells: each cell is read once for this many
_EMITTED_ROWS = 1 << 16
_SHUFFLED_PER_VECTOR = 32  # shuffled rows that cost as much as a vector on the driver's disk
_DUPLICATE_ROWS = 1 << 14  # per block of vectors; a task compares two blocks

_Batches = Iterator[pa.RecordBatch]


def nearest(
    queries: DataFrame,
    features: DataFrame,
    k: int = 10,
    *,
    key: str = "path",
    column: str = "features",
    method: Method = "exact",
    recall: float = 0.95,
) -> DataFrame:
    """Finds the ``k`` rows of ``features`` with the highest cosine to each row of ``queries``.

    The result does not depend on partitioning: ties go to the smaller key. A query that is also in
    ``features`` is its own neighbour. Rows without a vector are ignored. A vector that is zero or
    has a non-finite value has cosine 0 to every vector.

    The call collects the smaller side to the driver's disk, and ships it to the executors as a file
    that workers map: 4 bytes per value. The larger side is read when the result is computed.

    Args:
        queries: A data frame with the columns ``key`` and ``column``.
        features: A data frame with the same columns, possibly the same data frame.
        k: The number of neighbours, at least 1. If ``features`` has fewer rows, all are returned.
        key: The name of the key column: strings, integers or bytes, unique in each data frame.
        column: The name of the vector column: ``array<float>``, ``array<double>`` or vectors of
            ``pyspark.ml``, all of the same length.
        method: ``"exact"`` or ``"clustered"``. The latter assigns the rows of ``features`` to the
            cells of a k-means clustering, and compares a query only with its nearest cells (an
            inverted file: Sivic and Zisserman 2003). It requires the extra ``search``.
        recall: With ``"clustered"``, the target share of true neighbours to find. The number of
            cells to compare is chosen on a sample of the queries. The recall on the sample is in
            the metadata of ``cosine``, as ``recall``, and in the log. It is not a guarantee.

    Returns:
        A data frame with the columns ``query`` and ``neighbour`` (of the type of ``key``), ``rank``
        (int, from 1) and ``cosine`` (float, a multiple of 2**-20).

    Raises:
        OptionError: An option is out of range, a column is missing or has another type, a key is
            null or not unique, or ``features`` has no rows.
        FingerprintError: The features come from different models, only one side has provenance, or
            vectors differ in length. If the workers detect this, the query fails with this error.
    """
    k = check_positive("k", k)
    _check_method(method)
    if not 0 < recall <= 1:
        raise OptionError(f"recall={recall} is not valid: use a number above 0 and at most 1")
    asked, there = keyed(queries, key, column), keyed(features, key, column)
    kind = there.schema["key"].dataType
    if kind != asked.schema["key"].dataType:
        raise OptionError(
            f"the keys {key!r} are of type {asked.schema['key'].dataType.simpleString()} "
            f"and {kind.simpleString()}: use the same type for both"
        )
    _check_comparable(queries, features, column)
    count, partitions = count_keys(there)
    if not count:
        raise OptionError("there are no vectors to search")
    asked_count = count if queries is features else count_keys(asked)[0]
    with workspace(features.sparkSession) as space:
        if method == "exact" and _shuffles_little(asked_count, count, partitions, k):
            return _nearest_of_few(collect(asked, asked_count, space), there, k, kind)
        vectors, cells, reached = collect(there, count, space), None, None
        if method == "clustered" and vectors.rows:
            others = None if queries is features else (asked, asked_count)
            cells, reached = cells_for_queries(space, others, vectors, k, recall)
    compared: Any = _nearest_of_many
    if queries is features:  # the vectors are collected: do not compute them again
        shares = _shares(features.sparkSession, vectors.rows, _rows_at_once(cells))
        asked = _each(features.sparkSession, len(shares))
        compared = functools.partial(_nearest_of_each, shares=shares)
    compared = functools.partial(compared, vectors=vectors, cells=cells, k=k)
    metadata = {} if reached is None else {"recall": reached}
    cosine = F.col("cosine").alias("cosine", metadata=metadata)
    return asked.mapInArrow(compared, _result(kind)).withColumn("cosine", cosine)


def _shuffles_little(queries: int, vectors: int, partitions: int, k: int) -> bool:
    """Returns whether collecting the queries, not the vectors, is the cheaper way.

    Each partition of the vectors then returns its k nearest to each query, which are shuffled.
    """
    shuffled = queries * min(k * partitions, vectors)
    return queries < vectors and shuffled <= _SHUFFLED_PER_VECTOR * vectors


def near_duplicates(
    features: DataFrame,
    min_cosine: float = 0.95,
    *,
    key: str = "path",
    column: str = "features",
    method: Method = "exact",
) -> DataFrame:
    """Finds groups of rows that are linked by cosines of at least ``min_cosine``.

    A group is a connected component of two or more rows. Two of its members may be less similar, if
    others link them. The result does not depend on partitioning.

    The call collects all vectors to the driver's disk, ships them to the executors as a file that
    workers map, and compares them.

    Args:
        features: A data frame with the columns ``key`` and ``column``, as for ``nearest``.
        min_cosine: The threshold, above 0 and at most 1.
        key: The name of the key column: unique strings, integers or bytes.
        column: The name of the vector column: ``array<float>``, ``array<double>`` or vectors of
            ``pyspark.ml``.
        method: ``"exact"`` or ``"clustered"``. The latter compares vectors within the cells of a
            k-means clustering and with the nearest other cells (as in SemDeDup: Abbas et al. 2023).
            The number of cells is chosen to find 0.995 of a sample of pairs with that cosine. It
            requires the extra ``search``.

    Returns:
        A data frame with the columns ``key``, under its own name, and ``group``, the smallest key
        of the group.

    Raises:
        OptionError: An option is out of range, a column is missing or has another type, or a key is
            null or not unique.
        FingerprintError: Vectors differ in length.
    """
    min_cosine = check_min_cosine(min_cosine)
    _check_method(method)
    side = keyed(features, key, column)
    key = existing_column(features.columns, key)
    if key.casefold() == "group":
        raise OptionError(f"the key {key!r} is not valid: the result has its own column 'group'")
    kind = side.schema["key"].dataType
    rows, _ = count_keys(side)
    link: Any = _linked_in_blocks
    with workspace(features.sparkSession) as space:
        vectors = collect(side, rows, space)
        tasks: list[Any] = _pairs_of_blocks(vectors.rows)
        if method == "clustered":
            cells = cells_for_pairs(space, vectors, min_cosine)
            link, tasks = functools.partial(linked_in_cell, cells=cells), cells.tasks
        edges = _each(features.sparkSession, len(tasks)).mapInArrow(
            functools.partial(
                _edges, link=link, tasks=tasks, vectors=vectors, min_cosine=min_cosine
            ),
            "a long, b long",
        )
        result = StructType([StructField(key, kind, False), StructField("group", kind, False)])
        return components(edges).mapInArrow(functools.partial(_named, vectors=vectors), result)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise OptionError(f"method={method!r} is not valid: {did_you_mean(method, METHODS)}")


def _check_comparable(queries: DataFrame, features: DataFrame, column: str) -> None:
    """Checks provenance. Without any, only the vectors' lengths are checked, on the workers."""
    made_of = [_provenance_of(side, column) for side in (queries, features)]
    if all(made_of):
        check_same(*made_of)  # type: ignore[arg-type]
    elif any(made_of):
        silent = "queries" if made_of[1] else "features"
        raise FingerprintError(f"the column {column!r} of {silent} has no provenance")


def _provenance_of(df: DataFrame, column: str) -> Provenance | None:
    metadata = own_metadata(df.schema[existing_column(df.columns, column)].metadata)
    return Provenance.of_metadata(metadata, column) if metadata else None


def _result(kind: DataType) -> StructType:
    return StructType(
        [
            StructField("query", kind, False),
            StructField("neighbour", kind, False),
            StructField("rank", IntegerType(), False),
            StructField("cosine", FloatType(), False),
        ]
    )


def _each(session: SparkSession, count: int) -> DataFrame:
    """Returns a row for each task, with ``id`` from 0, each in its own partition."""
    return session.range(0, count, 1, max(1, count))


def _nearest_of_many(
    batches: _Batches, vectors: VectorFile, cells: Cells | None, k: int
) -> _Batches:
    """Compares streamed queries with the vectors, on a worker."""
    keys, units = vectors.read_keys(), vectors.units()
    for queries, block in blocks(batches, _rows_at_once(cells), vectors.features or None):
        yield from _found(queries, block, keys, units, cells, k)


def _shares(session: SparkSession, rows: int, size: int) -> list[slice]:
    """Returns equal shares of at most ``size`` rows, enough to keep all cores busy to the end."""
    cores = 1 if is_connect(session) else session.sparkContext.defaultParallelism
    count = max(1, math.ceil(rows / size / cores)) * cores
    ends = [rows * number // count for number in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def _nearest_of_each(
    batches: _Batches, vectors: VectorFile, cells: Cells | None, k: int, shares: list[slice]
) -> _Batches:
    """Compares each task's share of the vectors with all vectors, on a worker."""
    keys, units = vectors.read_keys(), vectors.units()
    for batch in batches:
        for task in batch.column(0).to_pylist():
            rows = shares[task]
            yield from _found(keys[rows], units[rows], keys, units, cells, k)


def _rows_at_once(cells: Cells | None) -> int:
    return _QUERY_ROWS if cells is None else _CELL_QUERY_ROWS


def _found(
    queries: Any, block: Vectors, keys: Any, units: Vectors, cells: Cells | None, k: int
) -> _Batches:
    if not len(units):
        return
    if cells is not None:
        row, index, cosine = nearest_in_cells(block, units, cells, k)
    else:
        indices, cosines = nearest_units(block, units, k)
        row = np.repeat(np.arange(len(block)), indices.shape[1])
        index, cosine = indices.ravel(), cosines.ravel()
    yield from _emitted(queries, keys, row, index, cosine)


def _emitted(
    queries: Any, keys: Any, row: Any, index: Any, cosine: Any
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of the result for selected candidates, which are in order."""
    rank = rank_in_row(row) + 1
    for begin in range(0, len(row), _EMITTED_ROWS):
        part = slice(begin, begin + _EMITTED_ROWS)
        columns = [
            small(queries.take(pa.array(row[part]))),
            small(keys.take(pa.array(index[part]))),
            pa.array(rank[part].astype(np.int32)),
            pa.array(cosine[part]),
        ]
        yield pa.RecordBatch.from_arrays(columns, ["query", "neighbour", "rank", "cosine"])


def _nearest_of_few(queries: VectorFile, there: DataFrame, k: int, kind: DataType) -> DataFrame:
    """Selects the nearest of each partition, and the nearest among these."""
    found = there.mapInArrow(
        functools.partial(_nearest_of_partition, queries=queries, k=k), _result(kind)
    )
    best = Window.partitionBy("query").orderBy(F.desc("cosine"), "neighbour")
    return found.withColumn("rank", F.row_number().over(best)).where(F.col("rank") <= k)


def _nearest_of_partition(batches: _Batches, queries: VectorFile, k: int) -> _Batches:
    """Compares streamed vectors with all queries, on a worker."""
    units = queries.units()
    if not queries.rows:
        return
    best = pa.table({})
    for keys, block in blocks(batches, _ROWS, queries.features):
        indices, cosines = nearest_units(units, block, k)
        row = np.repeat(np.arange(len(units)), indices.shape[1])
        found = pa.table(
            {"row": row, "cosine": cosines.ravel(), "key": keys.take(pa.array(indices.ravel()))}
        )
        best = _best_of(pa.concat_tables([best, found]) if best else found, k)
    if not best:
        return
    asked = queries.read_keys()
    row = best.column("row").to_numpy()
    keys, index = best.column("key").combine_chunks(), np.arange(len(row))
    yield from _emitted(asked, keys, row, index, best.column("cosine").to_numpy())


def _best_of(found: Any, k: int) -> Any:
    found = found.sort_by([("row", "ascending"), ("cosine", "descending"), ("key", "ascending")])
    return found.filter(pa.array(rank_in_row(found.column("row").to_numpy()) < k))


_Links = Iterator[tuple[Any, Any]]


def _edges(
    batches: _Batches,
    link: Callable[[Any, VectorFile, float], _Links],
    tasks: list[Any],
    vectors: VectorFile,
    min_cosine: float,
) -> _Batches:
    """Yields a spanning forest of near vectors for each task, on a worker."""
    for batch in batches:
        for task in batch.column(0).to_pylist():
            for rows, root in link(tasks[task], vectors, min_cosine):
                linked = root != np.arange(len(root))
                columns = [pa.array(rows[root[linked]]), pa.array(rows[linked])]
                yield pa.RecordBatch.from_arrays(columns, ["a", "b"])


def _pairs_of_blocks(rows: int) -> list[tuple[slice, slice]]:
    parts = [
        slice(begin, min(begin + _DUPLICATE_ROWS, rows))
        for begin in range(0, rows, _DUPLICATE_ROWS)
    ]
    return list(itertools.combinations_with_replacement(parts, 2))


def _linked_in_blocks(task: tuple[slice, slice], vectors: VectorFile, min_cosine: float) -> _Links:
    units = vectors.units()
    first, second = task
    rows = np.arange(first.start, first.stop)
    below = beside = slice(0, len(rows))
    if second != first:
        rows = np.concatenate([rows, np.arange(second.start, second.stop)])
        beside = slice(below.stop, len(rows))
    root = np.arange(len(rows))
    link_near(root, units[rows], below, beside, min_cosine)
    yield rows, root


def _named(batches: _Batches, vectors: VectorFile) -> _Batches:
    """Replaces row numbers with keys."""
    keys = vectors.read_keys()
    for batch in batches:
        columns = [small(keys.take(batch.column(0))), small(keys.take(batch.column(1)))]
        yield pa.RecordBatch.from_arrays(columns, ["key", "group"])
