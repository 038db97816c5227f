"""The sources that ``extract`` reads: files, a table or data frame, or WebDataset shards.

A source is read twice. ``keys`` returns all keys without the images. ``rows`` returns the images of
selected keys. No image is moved to find out whether it is pending.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import pyarrow as pa
from pyarrow import parquet
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, LongType, StringType, StructField, StructType

from imagevec.errors import OptionError
from imagevec.spark.sessions import (
    binary_fields,
    check_boxes_column,
    check_input_column,
    default_parallelism,
    existing_column,
    find_column,
    quoted,
)
from imagevec.storage.folder import Folder
from imagevec.storage.listing import Listed, check_exists, list_files
from imagevec.table.files import read_files, write_files
from imagevec.table.schema import (
    BOX_COLUMNS,
    BOXES,
    CHANGED,
    IMAGE,
    OWN_COLUMNS,
    OWN_PREFIX,
    SOURCE_ERROR,
)
from imagevec.table.webdataset import IMAGE_EXTENSIONS, read_shards, shards

# The size of a task: seconds with a small model, minutes with a large one.
_TASK_BYTES = 64 << 20
_TASK_ROWS = 10_000
_SMALLEST_TASK_BYTES = 2 << 20
_LEAST_BYTES = 32 << 10  # a smaller file counts as this many
_TASKS_PER_CORE = 3

_MAX_BROADCAST_KEYS = 200_000

_LISTING = pa.schema([("path", pa.string()), ("length", pa.int64()), ("modified", pa.int64())])
_LISTING_ROWS = 200_000  # of a file of the listing
_CHUNK_ROWS = 10_000

_JSON = {"ignoreNullFields": "true", "timeZone": "UTC"}  # whatever the session's settings


@dataclass(frozen=True)
class Survey:
    """Statistics of the keys of a source.

    Attributes:
        found: The number of images.
        partitions: The number of partitions with these images.
        pending: The number of images to compute.
    """

    found: int
    partitions: int
    pending: int


def found_in_keys() -> tuple[Column, ...]:
    """Returns aggregates over ``Source.keys``, for a ``Survey`` and for ``check_keys``."""
    return (
        F.coalesce(F.sum("count"), F.lit(0)).alias("found"),
        F.coalesce(F.max("partition") + 1, F.lit(1)).alias("partitions"),
        F.sum(F.when(F.col("path").isNull(), F.col("count"))).alias("nulls"),
        F.max("count").alias("most"),
        F.max_by("path", "count").alias("most_frequent"),
    )


class Source(Protocol):
    """A source of images with keys."""

    def prepare(self, folder: Folder) -> None:
        """Writes the listing to a folder, so that all later reads see the same images."""

    def keys(self) -> DataFrame:
        """Returns a row for each key.

        The columns are ``path``, ``version`` (a string that differs if an image has changed),
        ``count`` (the number of images with this key) and ``partition`` (the number of the last
        partition with such an image).
        """

    def rows(self, survey: Survey, pending: DataFrame | None) -> DataFrame:
        """Returns the images of the keys in ``pending``, or all, in partitions of a suitable size.

        The columns are ``path``, ``length``, ``modificationTime``, ``version``, ``IMAGE`` (of a
        type that ``features_udf`` accepts), ``SOURCE_ERROR``, ``CHANGED``, the kept columns and, if
        the source has boxes, ``BOXES``.
        """

    def mended(self, known: DataFrame) -> list[str]:
        """Returns the paths of table rows that report damage which has been repaired."""

    @property
    def kept(self) -> StructType:
        """The kept columns, with their types."""

    @property
    def boxes(self) -> ArrayType | None:
        """The type of ``BOXES``, or ``None`` if the source has no boxes."""

    @property
    def skipped(self) -> dict[str, int]:
        """The number of skipped entries, by reason."""


class FileSource:
    """Image files. The driver writes their list to a file, in parts; the workers read them."""

    boxes = None

    def __init__(
        self,
        spark: SparkSession,
        src: str,
        *,
        recursive: bool,
        pattern: str | None,
        timeout_seconds: float,
    ) -> None:
        check_exists(src, timeout_seconds)
        self._spark = spark
        self._list = functools.partial(
            list_files,
            src,
            recursive=recursive,
            pattern=pattern,
            timeout_seconds=timeout_seconds,
        )
        self.kept = StructType()
        self.skipped: Counter[str] = Counter()

    def prepare(self, folder: Folder) -> None:
        self._size = 0
        files = self._list()
        names = []
        for number, rows in enumerate(_grouped(map(self._listed, _chunks(files)))):
            sink = pa.BufferOutputStream()
            parquet.write_table(pa.Table.from_batches(rows, _LISTING), sink)
            names.append(f"files-{number:05}.parquet")
            folder.write(names[-1], sink.getvalue().to_pybytes())
        schema = StructType(
            [
                StructField("path", StringType()),
                StructField("length", LongType()),
                StructField("modified", LongType()),
            ]
        )
        self._listing = read_files(self._spark, folder, names, schema)

    def _listed(self, files: list[Listed]) -> pa.RecordBatch:
        """Returns the images among some files as rows."""
        self.skipped.update(file.skipped for file in files if file.skipped)
        images = [file for file in files if not file.skipped]
        self._size += sum(max(file.length, _LEAST_BYTES) for file in images)
        rows = [dict(zip(_LISTING.names, file, strict=False)) for file in images]
        return pa.RecordBatch.from_pylist(rows, _LISTING)

    def keys(self) -> DataFrame:
        one, first = F.lit(1).alias("count"), F.lit(0).alias("partition")
        return self._files().select("path", "version", one, first)

    def rows(self, survey: Survey, pending: DataFrame | None) -> DataFrame:
        rows = _of_keys(self._files(), survey, pending).withColumn(IMAGE, F.col("path"))
        size = self._size * survey.pending / survey.found
        # By path: a partition that is computed again after a crash has the same files.
        return rows.repartition(_number_of_tasks(size, default_parallelism(self._spark)), "path")

    def mended(self, known: DataFrame) -> list[str]:
        return []

    def _files(self) -> DataFrame:
        modified = F.timestamp_micros("modified")
        version = F.concat_ws(":", F.col("length"), F.col("modified"))
        return self._listing.select(
            "path",
            "length",
            modified.alias("modificationTime"),
            version.alias("version"),
            F.lit(None).cast("string").alias(SOURCE_ERROR),
        )


class TableSource:
    """Rows of a data frame with a column of images or image paths."""

    def __init__(
        self,
        df: DataFrame,
        *,
        column: str,
        key: str | None,
        version: str | None,
        keep: Sequence[str],
        boxes: str | None = None,
    ) -> None:
        self.skipped: dict[str, int] = {}
        self._df = df
        image = check_input_column(df.schema, column)
        kind = df.schema[image].dataType
        self._image = F.col(quoted(image))
        self._boxes: list[Column] = []  # one or none
        self.boxes: ArrayType | None = None
        if boxes is not None:
            boxes = check_boxes_column(df.schema, boxes)
            self.boxes = cast(ArrayType, df.schema[boxes].dataType)
            self._boxes = [F.col(quoted(boxes)).alias(BOXES)]
        self._key = self._key_column(image, kind, key)
        _check_names(keep, OWN_COLUMNS if self.boxes is None else (*OWN_COLUMNS, *BOX_COLUMNS))
        types = [df.schema[existing_column(df.columns, name)].dataType for name in keep]
        self.kept = StructType(list(map(StructField, keep, types)))
        length = find_column(df.columns, "length") if version is None else None
        modified = find_column(df.columns, "modificationTime") if length else None
        self._modified = F.lit(None).cast("timestamp")
        # As JSON: the hash of an array skips nulls, so that different boxes could have the same.
        hashed = [F.to_json(boxes, _JSON) for boxes in self._boxes]
        if version is not None:
            self._version = F.col(quoted(existing_column(df.columns, version))).cast("string")
        elif length and modified:  # columns of the binaryFile source
            self._modified = F.col(modified)
            of_boxes = [F.hex(F.xxhash64(boxes)) for boxes in hashed]
            self._version = F.concat_ws(":", F.col(length), F.unix_micros(modified), *of_boxes)
        elif not isinstance(kind, StringType):
            self._version = F.hex(F.xxhash64(self._image, *hashed))
        elif hashed:
            self._version = F.hex(F.xxhash64(*hashed))
        else:  # the hash of a path would never change
            self._version = F.lit(None).cast("string")
        self._length = _length_of(self._image, kind)

    def prepare(self, folder: Folder) -> None:
        pass  # the data frame is assumed not to change

    def keys(self) -> DataFrame:
        path, version = self._key.alias("path"), self._version.alias("version")
        return _counted(self._df.select(path, version, F.spark_partition_id().alias("partition")))

    def rows(self, survey: Survey, pending: DataFrame | None) -> DataFrame:
        rows = self._df.select(
            self._key.alias("path"),
            self._length.alias("length"),
            self._modified.alias("modificationTime"),
            self._version.alias("version"),
            self._image.alias(IMAGE),
            F.lit(None).cast("string").alias(SOURCE_ERROR),
            *map(quoted, self.kept.names),
            *self._boxes,
        )
        rows = _of_keys(rows, survey, pending)
        # Partitions with this many rows have small rows, which are cheap to move.
        if survey.pending > survey.partitions * _TASK_ROWS:
            return rows.repartition(math.ceil(survey.pending / _TASK_ROWS), "path")
        return rows

    def mended(self, known: DataFrame) -> list[str]:
        return []

    def _key_column(self, image: str, kind: object, key: str | None) -> Column:
        if key is not None:
            return F.col(quoted(existing_column(self._df.columns, key))).cast("string")
        path = find_column(self._df.columns, "path")
        if path is not None:
            return F.col(quoted(path)).cast("string")
        if isinstance(kind, StringType):
            return self._image
        if isinstance(kind, StructType) and "path" in kind.names:
            return self._image["path"]
        raise OptionError(
            f"there is no column 'path' to use as the key: choose a key from {self._df.columns}"
        )


class ShardSource:
    """Samples in WebDataset shards. A damaged shard has its own row."""

    boxes = None

    def __init__(
        self,
        spark: SparkSession,
        src: str,
        *,
        recursive: bool,
        keep: Sequence[str],
        timeout_seconds: float,
        max_bytes: int,
    ) -> None:
        for name in keep:
            if name in IMAGE_EXTENSIONS:
                raise OptionError(f"keep={name!r} is not valid: {name} members are images")
        _check_names(keep)
        self.kept = StructType([StructField(name, StringType()) for name in keep])
        self.skipped: dict[str, int] = {}
        self._spark = spark
        self._shards = shards(src, recursive, timeout_seconds)
        self._read = functools.partial(
            read_shards,
            spark,
            self._shards,
            timeout_seconds=timeout_seconds,
            max_bytes=max_bytes,
        )

    def prepare(self, folder: Folder) -> None:
        samples = self._read(images=False).select(_path_of_sample(), "__url__")
        schema = samples.schema
        names = write_files(samples, folder)
        self._keys = read_files(self._spark, folder, names, schema)

    def keys(self) -> DataFrame:
        keys = self._with_version(self._keys).withColumn("partition", F.lit(0))
        return _counted(keys.select("path", "version", "partition"))

    def rows(self, survey: Survey, pending: DataFrame | None) -> DataFrame:
        samples = self._read(tuple(self.kept.names))
        rows = self._with_version(samples.withColumn("path", _path_of_sample())).select(
            "path",
            F.octet_length("image").cast("long").alias("length"),
            F.lit(None).cast("timestamp").alias("modificationTime"),
            "version",
            F.col("image").alias(IMAGE),
            F.col("error").alias(SOURCE_ERROR),
            *map(quoted, self.kept.names),
        )
        return _of_keys(rows, survey, pending)

    def mended(self, known: DataFrame) -> list[str]:
        """Returns shards that were damaged and are now complete."""
        paths = [(shard.path,) for shard in self._shards]
        whole = self._spark.createDataFrame(paths, "path string").join(
            self._keys.where(F.col("path") == F.col("__url__")), "path", "left_anti"
        )
        return [row.path for row in known.join(F.broadcast(whole), "path", "left_semi").collect()]

    def _with_version(self, samples: DataFrame) -> DataFrame:
        """Adds the version of each sample, which is its shard's."""
        versions = [(shard.path, f"{shard.length}:{shard.modified}") for shard in self._shards]
        of_shards = self._spark.createDataFrame(versions, "__url__ string, version string")
        return samples.join(F.broadcast(of_shards), "__url__")


def _chunks(files: Iterator[Listed]) -> Iterator[list[Listed]]:
    while chunk := list(itertools.islice(files, _CHUNK_ROWS)):
        yield chunk


def _grouped(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Groups batches to the files of a listing, at least one."""
    group: list[pa.RecordBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(batch.num_rows for batch in group) >= _LISTING_ROWS:
            yield group
            group = []
    yield group


def _counted(keys: DataFrame) -> DataFrame:
    return keys.groupBy("path").agg(
        F.max("version").alias("version"),
        F.count("*").alias("count"),
        F.max("partition").alias("partition"),
    )


def _of_keys(rows: DataFrame, survey: Survey, pending: DataFrame | None) -> DataFrame:
    """Selects the pending rows. Few keys are broadcast; with many, Spark shuffles both sides."""
    if pending is None:
        return rows.withColumn(CHANGED, F.lit(False))
    keys = pending.select("path", F.col("is_changed").alias(CHANGED))
    few = survey.pending <= _MAX_BROADCAST_KEYS
    return rows.join(F.broadcast(keys) if few else keys, "path")


def _path_of_sample() -> Column:
    return F.coalesce("__key__", "__url__").alias("path")


def _number_of_tasks(size: float, cores: int) -> int:
    """Returns the number of tasks for files that count as ``size`` bytes."""
    for_all_cores = min(_TASKS_PER_CORE * cores, math.ceil(size / _SMALLEST_TASK_BYTES))
    return max(1, math.ceil(size / _TASK_BYTES), for_all_cores)


def _length_of(image: Column, kind: object) -> Column:
    if isinstance(kind, StructType):
        return F.octet_length(image[binary_fields(kind)[0]]).cast("long")
    if isinstance(kind, BinaryType):
        return F.octet_length(image).cast("long")
    return F.lit(None).cast("long")  # unknown for a path


def _check_names(keep: Sequence[str], own: Sequence[str] = OWN_COLUMNS) -> None:
    for name in keep:
        if find_column(own, name):
            raise OptionError(f"keep={name!r} is not valid: the result already has this column")
        if name.casefold().startswith(OWN_PREFIX):
            raise OptionError(f"keep={name!r} is not valid: imagevec itself uses {OWN_PREFIX}...")
        if [other.casefold() for other in keep].count(name.casefold()) > 1:
            raise OptionError(f"keep={name!r} is not valid: give it once")


def check_keys(found: Mapping[str, Any]) -> None:
    """Raises ``OptionError`` unless each key identifies one image, according to ``found``."""
    if found["nulls"]:
        raise OptionError(
            f"{found['nulls']:,} of {found['found']:,} rows have no key: "
            "choose another key, or exclude them with where"
        )
    if (found["most"] or 0) > 1:
        raise OptionError(
            f"the key {found['most_frequent']!r} occurs {found['most']:,} times: "
            "choose a unique key, or add one to a data frame"
        )
