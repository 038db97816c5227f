"""The vectors of a table as a file on every executor, which workers map instead of loading it.

The rows are sorted by key. In a tie, the lower index is the smaller key.
"""

from __future__ import annotations

import atexit
import binascii
import functools
import hashlib
import math
import shutil
import tempfile
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
from imagevec.files import PREFIX
from imagevec.search.neighbours import Indices, Vectors, unit_vectors
from imagevec.spark.sessions import existing_column, failures_in_words, is_connect, quoted
from imagevec.spark.ship import ship_file, shipped

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


def count_keys(side: DataFrame) -> int:
    """Returns the number of rows.

    Raises:
        OptionError: A key is null or not unique.
    """
    keys = side.select("key").groupBy("key").count()
    with failures_in_words():
        found = keys.agg(
            F.coalesce(F.sum("count"), F.lit(0)).alias("rows"),
            F.sum(F.when(F.col("key").isNull(), F.col("count"))).alias("nulls"),
            F.max("count").alias("most"),
            F.max_by("key", "count").alias("most_frequent"),
        ).first()
    assert found is not None, "an aggregate has a row"
    if found["nulls"]:
        raise OptionError(
            f"{found['nulls']:,} of {found['rows']:,} rows have no key: filter them out"
        )
    if (found["most"] or 0) > 1:
        raise OptionError(
            f"the key {found['most_frequent']!r} occurs {found['most']:,} times: "
            "choose a unique key"
        )
    return int(found["rows"])


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

    def units(self, folder: Path | None = None) -> Vectors:
        """Returns the vectors, float32 ``(rows, features)``, of a shipped or a local file."""
        path = shipped(self.name) if folder is None else folder / self.name
        if self.rows == 0:
            return np.empty((0, self.features), np.float32)
        return np.memmap(path, np.float32, "r", shape=(self.rows, self.features))

    def read_keys(self) -> Any:
        """Returns the keys, an Arrow array, on a worker."""
        with pa.memory_map(str(shipped(self.keys))) as file:
            return pa.ipc.open_file(file).read_all().column(0).combine_chunks()


def collect(side: DataFrame, rows: int) -> VectorFile:
    """Collects the vectors of ``keyed`` to the driver's disk, and ships them to the executors.

    All workers compute them, once. Neither the JVM nor this process holds them in memory.

    Args:
        side: The data frame of ``keyed``.
        rows: The result of ``count_keys``.

    Raises:
        FingerprintError: Vectors differ in length.
    """
    kind = side.schema["key"].dataType
    packed = side.mapInArrow(_packed, f"keys array<{kind.simpleString()}>, vectors binary")
    # Spark computes all pieces before the first one arrives; then they arrive one by one.
    pieces = packed.repartition(max(1, math.ceil(rows / _PIECE_ROWS)), "keys")
    part = folder() / "part"
    chunks: list[Any] = []
    lengths: set[int] = set()
    with failures_in_words(), part.open("wb") as file:
        for some, text in _brought(pieces.select("keys", F.base64("vectors"))):
            vectors = binascii.a2b_base64(text)
            chunks.append(pa.array(some, arrow_type(kind)))
            lengths.add(len(vectors) // 4 // max(1, len(some)))
            file.write(vectors)
    if len(lengths) > 1:
        few, many = sorted(lengths)[:2]
        raise FingerprintError(
            f"vectors of {few} and of {many} features are not comparable: use one model"
        )
    keys = pa.chunked_array(chunks, arrow_type(kind)).combine_chunks()
    features = lengths.pop() if lengths else 0
    order = pc.sort_indices(keys)
    made = VectorFile(part.name, "", len(keys), features)
    name = _write_in_order(made.units(folder()), order.to_numpy())
    part.unlink()
    made = VectorFile(name, _write_keys(keys.take(order)), len(keys), features)
    ship_file(side.sparkSession, folder() / made.name)
    ship_file(side.sparkSession, folder() / made.keys)
    return made


def _brought(pieces: DataFrame) -> Iterator[Row]:
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


def _write_in_order(units: Vectors, order: Indices) -> str:
    """Writes rows in the given order. Returns the file's name, which depends on its content."""
    sha256 = hashlib.sha256()
    path = folder() / "ordered"
    with path.open("wb") as file:
        for begin in range(0, len(order), _GATHERED_ROWS):
            rows = units[order[begin : begin + _GATHERED_ROWS]].tobytes()
            sha256.update(rows)
            file.write(rows)
    return path.replace(folder() / f"{PREFIX}{sha256.hexdigest()}.f32").name


def _write_keys(keys: Any) -> str:
    table = pa.table({"key": keys})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return write_bytes(memoryview(sink.getvalue()), "arrow")


def write_bytes(content: memoryview, suffix: str) -> str:
    """Writes a file that is named by its content. Returns the name."""
    name = f"{PREFIX}{hashlib.sha256(content).hexdigest()}.{suffix}"
    (folder() / name).write_bytes(content)
    return name


@functools.cache
def folder() -> Path:
    """Returns this process's folder, from which Spark serves files as long as the process lives."""
    path = Path(tempfile.mkdtemp(prefix="imagevec-search-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
