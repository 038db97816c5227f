"""Parquet files that tasks read and write through ``storage``, with the same clients as the parts.

So a table in a folder needs no connector of Hadoop, and no second set of credentials.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StringType, StructField, StructType

from imagevec.errors import ImageVecError
from imagevec.storage.folder import Folder
from imagevec.table.parts import NOT_SHARED, codec_of
from imagevec.table.schema import SPARK_SCHEMA

FILE = "imagevec_file"
"""The column of ``read_files`` with the name of the file."""

_ROWS = 10_000  # of a batch
_TASKS = 64  # at least, if there are as many files


def read_files(
    spark: SparkSession, folder: Folder, names: Sequence[str], schema: StructType
) -> DataFrame:
    """Reads columns of Parquet files in a folder. Further columns are ignored.

    Returns:
        A data frame with these columns and ``FILE``.
    """
    columns = to_arrow_schema(schema)

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for name in batch.column(0).to_pylist():
                yield from _read(folder, name, columns)

    files = spark.createDataFrame([(name,) for name in names], f"{FILE} string")
    tasks = max(1, min(len(names), _TASKS + len(names) // _TASKS))
    with_file = StructType([*schema, StructField(FILE, StringType())])
    return files.repartition(tasks).mapInArrow(read, with_file)


def _read(folder: Folder, name: str, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        opened = folder.open(name)
    except FileNotFoundError as error:
        raise ImageVecError(f"{folder.path}/{name} {NOT_SHARED}") from error
    with opened as source:
        file = parquet.ParquetFile(source)
        for batch in file.iter_batches(_ROWS, columns=columns.names):
            fields = [batch.column(field.name).cast(field.type) for field in columns]
            of_file = pa.array([name] * batch.num_rows, pa.string())
            yield pa.RecordBatch.from_arrays([*fields, of_file], [*columns.names, FILE])


def write_files(rows: DataFrame, folder: Folder) -> list[str]:
    """Writes a data frame as Parquet files. Returns their names, of one attempt for each task."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        first = next(iter(batches := iter(batches)), None)
        if first is not None:
            name = f"part-{_task()}.parquet"
            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary) / name
                with parquet.ParquetWriter(file, first.schema) as writer:
                    writer.write_batch(first)
                    for batch in batches:
                        writer.write_batch(batch)
                folder.upload(file, name)
            yield pa.RecordBatch.from_pydict({FILE: [name]})

    return [row[FILE] for row in rows.mapInArrow(write, f"{FILE} string").collect()]


def rewrite_files(outdated: DataFrame, source: Folder, target: Folder) -> dict[str, str | None]:
    """Writes Parquet files again without some of their rows.

    Args:
        outdated: The columns ``FILE``, the name of a file in ``source``, and ``path``.
        source: The folder of the files.
        target: The folder of the new files.

    Returns:
        For each file, the name of the new one, or ``None`` if no row is left.
    """
    prefix = f"part-{uuid.uuid4().hex}"

    def rewrite(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number, (name, paths) in enumerate(_by_file(batches)):
            new = f"{prefix}-{_task()}-{number}.parquet"
            is_left = _rewrite(source, name, paths, target, new)
            columns = [pa.array([name]), pa.array([new if is_left else None], pa.string())]
            yield pa.RecordBatch.from_arrays(columns, ["old", "new"])

    files = outdated.repartition(FILE).sortWithinPartitions(FILE)
    return {
        row.old: row.new for row in files.mapInArrow(rewrite, "old string, new string").collect()
    }


def _by_file(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, set[str]]]:
    """Groups sorted rows of ``FILE`` and ``path``."""
    current: str | None = None
    paths: set[str] = set()
    for batch in batches:
        columns = (batch.column(name).to_pylist() for name in (FILE, "path"))
        for name, path in zip(*columns, strict=True):
            if current is not None and name != current:
                yield current, paths
                paths = set()
            current = name
            paths.add(path)
    if current is not None:
        yield current, paths


def _rewrite(source: Folder, name: str, without: set[str], target: Folder, new: str) -> bool:
    """Writes a file again without the rows of some paths. Returns whether any row is left."""
    rows = 0
    values = pa.array(list(without), pa.string())
    with tempfile.TemporaryDirectory() as temporary, source.open(name) as opened:
        file = Path(temporary) / new
        # Spark cannot read nanoseconds.
        old = parquet.ParquetFile(opened, coerce_int96_timestamp_unit="us")
        with parquet.ParquetWriter(file, old.schema_arrow, compression=codec_of(old)) as writer:
            for batch in old.iter_batches(_ROWS):
                is_old = pc.is_in(batch.column("path"), values)
                rest = batch.filter(pc.invert(is_old))
                rows += rest.num_rows
                if rest.num_rows:
                    writer.write_batch(rest)
        if rows:
            target.upload(file, new)
    return rows > 0


def _task() -> str:
    context = TaskContext.get()
    assert context is not None, "Spark sets it in workers"
    return f"{context.partitionId():05}-{context.taskAttemptId()}"


def schema_of(folder: Folder, name: str) -> StructType:
    """Returns the columns of a Parquet file, with the metadata that Spark has stored for them."""
    with folder.open(name) as file:
        schema = parquet.read_schema(file)
    text = (schema.metadata or {}).get(SPARK_SCHEMA.encode())
    if text is None:
        return StructType([StructField(name, StringType()) for name in schema.names])
    return StructType.fromJson(json.loads(text))
