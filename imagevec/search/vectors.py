"""The vectors of a table as a file on every executor, which workers map instead of loading it.

The rows are sorted by key. In a tie, the lower index is the smaller key.
"""

from __future__ import annotations

import binascii
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    DoubleType,
    FloatType,
    IntegralType,
    StringType,
)

from imagevec.errors import FingerprintError, OptionError
from imagevec.search.neighbours import Indices, Vectors, unit_vectors
from imagevec.search.workspace import Workspace
from imagevec.spark.sessions import existing_column, failures_in_words, is_connect, quoted
from imagevec.spark.ship import shipped

_PACKED_BYTES = 2 << 20  # per transferred row
_PIECE_ROWS = 4096  # transferred at a time: the JVM holds several copies of them
_GATHERED_ROWS = 1 << 13


def keyed(df: DataFrame, key: str, column: str) -> DataFrame:
    """Returns the columns ``key`` and ``vector``, an array of floats or doubles.

    Raises:
        OptionError: A column does not exist, or has a type that cannot be searched.
    """
    key, column = existing_column(df.columns, key), existing_column(df.columns, column)
    kind, vector = df.schema[key].dataType, F.col(quoted(column))
    if not isinstance(kind, StringType | IntegralType | BinaryType):
        raise OptionError(
            f"the key {key!r} is of type {kind.simpleString()}: "
            "use a column of strings, integers or bytes"
        )
    type = df.schema[column].dataType
    if type.typeName() == "vectorudt":
        vector = vector_to_array(vector, "float32")
    elif not (isinstance(type, ArrayType) and isinstance(type.elementType, FloatType | DoubleType)):
        raise OptionError(
            f"column {column!r} is of type {type.simpleString()}: "
            "use an array of floats or doubles, or a vector of pyspark.ml"
        )
    return df.select(F.col(quoted(key)).alias("key"), vector.alias("vector"))


def count_keys(side: DataFrame) -> tuple[int, int]:
    """Returns the number of rows, and the number of partitions as far as is known.

    Raises:
        OptionError: A key is null or not unique.
    """
    placed = side.select("key", F.spark_partition_id().alias("partition"))
    keys = placed.groupBy("key").agg(
        F.count("*").alias("count"), F.max("partition").alias("partition")
    )
    with failures_in_words():
        found = keys.agg(
            F.coalesce(F.sum("count"), F.lit(0)).alias("rows"),
            F.sum(F.when(F.col("key").isNull(), F.col("count"))).alias("nulls"),
            F.max("count").alias("most"),
            F.max_by("key", "count").alias("most_frequent"),
            F.coalesce(F.max("partition") + 1, F.lit(1)).alias("partitions"),
        ).first()
    assert found is not None, "an aggregate has a row"
    if found["nulls"]:
        raise OptionError(
            f"{found['nulls']:,} of {found['rows']:,} rows have no key: filter them out"
        )
    if (found["most"] or 0) > 1:
        raise OptionError(
            f"the key {found['most_frequent']!r} occurs {found['most']:,} times: "
            "choose a unique key; for boxes, join path and box_number in one column"
        )
    return int(found["rows"]), int(found["partitions"])


def blocks(
    batches: Iterator[pa.RecordBatch], rows: int, features: int | None = None
) -> Iterator[tuple[Any, Vectors]]:
    """Yields blocks of at least ``rows`` of the columns ``key`` and ``vector``, sorted by key.

    Rows without a vector are omitted.

    Yields:
        Keys, an Arrow array of length B, and ``unit_vectors``, float32 ``(B, D)``.

    Raises:
        FingerprintError: Vectors differ in length, or their length is not ``features``.
    """
    waiting: list[tuple[Any, Vectors]] = []
    for batch in batches:
        batch = batch.filter(pc.is_valid(batch.column(1)))
        if batch.num_rows == 0:
            continue
        lengths = pc.unique(pc.list_value_length(batch.column(1))).to_pylist()
        features = features or lengths[0]
        if lengths != [features]:
            other = next(length for length in lengths if length != features)
            raise FingerprintError(
                f"vectors of {features} and of {other} features are not comparable: use one model"
            )
        values = batch.column(1).flatten().to_numpy(zero_copy_only=False)
        waiting.append((batch.column(0), values.reshape(batch.num_rows, features)))
        if sum(len(keys) for keys, _ in waiting) >= rows:
            yield _in_order(waiting)
            waiting = []
    if waiting:
        yield _in_order(waiting)


def _in_order(parts: list[tuple[Any, Any]]) -> tuple[Any, Vectors]:
    keys = pa.concat_arrays([keys for keys, _ in parts])
    order = pc.sort_indices(keys)
    values = np.concatenate([values for _, values in parts])
    return keys.take(order), unit_vectors(values[order.to_numpy()])


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors, as a worker needs it.

    Attributes:
        name: The name of the file of vectors, float32 ``(rows, features)``, of length 1 or zero.
        keys: The name of the file of their keys, an Arrow table.
        rows: The number of vectors.
        features: The length of a vector.
    """

    name: str
    keys: str
    rows: int
    features: int

    def units(self, space: Workspace | None = None) -> Vectors:
        """Returns the vectors, float32 ``(rows, features)``, on a worker or in a workspace."""
        path = shipped(self.name) if space is None else space.path(self.name)
        return _mapped(path, self.rows, self.features)

    def read_keys(self) -> Any:
        """Returns the keys, an Arrow array, on a worker."""
        with pa.memory_map(str(shipped(self.keys))) as file:
            return pa.ipc.open_file(file).read_all().column(0).combine_chunks()


def _mapped(path: Path, rows: int, features: int) -> Vectors:
    if rows == 0:  # an empty file cannot be mapped
        return np.empty((0, features), np.float32)
    return np.memmap(path, np.float32, "r", shape=(rows, features))


def collect(side: DataFrame, rows: int, space: Workspace) -> VectorFile:
    """Collects the vectors of ``keyed`` to the driver's disk, and ships them to the executors.

    All workers compute them, once. Neither the JVM nor this process holds them in memory.

    Args:
        side: The data frame of ``keyed``.
        rows: The number of rows, from ``count_keys``.
        space: The workspace of the search.

    Raises:
        FingerprintError: Vectors differ in length.
    """
    kind = side.schema["key"].dataType
    type = _large(arrow_type(kind))  # the offsets of all keys may exceed 32 bits
    packed = side.mapInArrow(_packed, f"keys array<{kind.simpleString()}>, vectors binary")
    # Spark computes all pieces before the first one arrives; then they arrive one by one.
    pieces = packed.repartition(max(1, math.ceil(rows / _PIECE_ROWS)), "keys")
    chunks: list[Any] = []
    lengths: set[int] = set()
    part = space.folder / "part"
    with failures_in_words(), part.open("wb") as file:
        for some, text in brought(pieces.select("keys", F.base64("vectors"))):
            vectors = binascii.a2b_base64(text)
            chunks.append(pa.array(some, type))
            lengths.add(len(vectors) // 4 // max(1, len(some)))
            space.needed_bytes = 2 * 4 * rows * max(lengths)  # here, and again in order
            file.write(vectors)
    if len(lengths) > 1:
        few, many = sorted(lengths)[:2]
        raise FingerprintError(
            f"vectors of {few} and of {many} features are not comparable: use one model"
        )
    keys = pa.chunked_array(chunks, type).combine_chunks()
    features = lengths.pop() if lengths else 0
    order = pc.sort_indices(keys)
    name = _ship_in_order(_mapped(part, len(keys), features), order.to_numpy(), space)
    part.unlink()
    return VectorFile(name, _ship_keys(keys.take(order), space), len(keys), features)


def brought(pieces: DataFrame) -> Iterator[Row]:
    """Yields the rows, a piece at a time.

    Spark pickles text twice as fast as bytes. A data frame's own iterator would leave all results
    in the JVM's memory: Spark 4 keeps the jobs of a query that it considers ended.
    """
    if is_connect(pieces.sparkSession):
        yield from pieces.toLocalIterator()
    else:
        yield from pieces.rdd.toLocalIterator(prefetchPartitions=True)


def arrow_type(kind: DataType) -> Any:
    """Returns the Arrow type of a key."""
    from pyspark.sql.pandas.types import to_arrow_type

    return to_arrow_type(kind)


def small(keys: Any) -> Any:
    """Returns an Arrow array of keys with 32-bit offsets, as Spark expects them by default."""
    kinds = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
    return keys.cast(kinds.get(keys.type, keys.type))


def _large(type: Any) -> Any:
    return {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}.get(type, type)


def _packed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Packs several rows into one, as bytes, which the driver unpacks without a Python loop."""
    for keys, units in blocks(batches, 1):
        size = max(1, _PACKED_BYTES // units[0].nbytes) if units.shape[1] else len(units)
        for begin in range(0, len(units), size):
            part = slice(begin, begin + size)
            some = keys[part]
            offsets = pa.array([0, len(some)], pa.int32())
            columns = [
                pa.ListArray.from_arrays(offsets, some),
                pa.array([units[part].tobytes()], pa.binary()),
            ]
            yield pa.RecordBatch.from_arrays(columns, ["keys", "vectors"])


def _ship_in_order(units: Vectors, order: Indices, space: Workspace) -> str:
    sha256 = hashlib.sha256()
    path = space.folder / "vectors.f32"
    with path.open("wb") as file:
        for begin in range(0, len(order), _GATHERED_ROWS):
            rows = units[order[begin : begin + _GATHERED_ROWS]].tobytes()
            sha256.update(rows)
            file.write(rows)
    return space.ship(path, sha256.hexdigest())


def _ship_keys(keys: Any, space: Workspace) -> str:
    table = pa.table({"key": keys})
    path = space.folder / "keys.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return space.ship(path)
