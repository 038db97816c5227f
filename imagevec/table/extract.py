"""A folder or table of images to a Parquet table of features, resumably.

The table has the columns ``path``, ``length``, ``modificationTime``, ``features``, ``width`` and
``height``; what could not be read is in the table ``DEST/_errors``, with ``error`` instead of the
last three. Images are done in chunks, each of which is committed before the next. Run again,
``extract`` does what is in neither table with the same path, length and modification time: rows of
files that were changed are taken out first, those of files that are gone stay.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from urllib.parse import unquote

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec.errors import FingerprintError, OptionError
from imagevec.spark.hadoop import Folder
from imagevec.spark.metrics import Metrics
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.spec import FeatureSpec
from imagevec.table.provenance import Provenance, check_same, provenance
from imagevec.table.sources import FileSource, TableSource, escaped

ERRORS = "_errors"
_KEPT = "_kept"  # rows on their way from one Parquet file to another
_CHUNK_PER_CORE = 250
_LOOK_EVERY_SECONDS = 0.25

Advance = Callable[[int, int], None]
"""Told of more images done, and errors among them."""

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Told how many images there are to do."""


class Extracted(NamedTuple):
    """What one run did.

    Attributes:
        found: Images in the source.
        done_before: Those that were in the table.
        features: Rows that were added to it.
        errors: Bad images by code.
    """

    found: int
    done_before: int
    features: int
    errors: Counter[str]


def extract(
    spark: SparkSession,
    source: FileSource | TableSource,
    table: Table,
    vectorizer: ImageVectorizer,
    progress: Progress,
    chunk_size: int | None = None,
    overwrite: bool = False,
) -> Extracted:
    """Adds to a table what it lacks of a source.

    Args:
        spark: The session.
        source: The images.
        table: The features, and their errors.
        vectorizer: With ``output="struct"``.
        progress: Is told of what is done.
        chunk_size: Images that are committed at a time.
        overwrite: Whether features of another fingerprint are replaced.

    Raises:
        FingerprintError: The table has features of another fingerprint.
        OptionError: What is at the table's place is none.
    """
    listed = source.listed().persist(StorageLevel.MEMORY_AND_DISK)  # fails where SRC is not
    if overwrite:
        table.remove()
    table.check(vectorizer.spec)
    known = table.known()
    table.take_out(_changed(known, listed))
    todo = [row.path for row in _missing(table.known(), listed).collect()]
    found = listed.count()
    size = chunk_size or _CHUNK_PER_CORE * spark.sparkContext.defaultParallelism
    done, errors = _run(todo, size, source, vectorizer, table, progress)
    return Extracted(found, found - len(todo), done - errors.total(), errors)


class Table:
    """The features and errors at one place, on whatever file system Spark knows."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._spark = spark
        self._folder = Folder(spark, path)
        self._path = self._folder.path

    def features(self) -> DataFrame | None:
        return self._read()

    def errors(self) -> DataFrame | None:
        return self._read(ERRORS)

    def known(self) -> DataFrame:
        """``path``, ``length`` and ``modificationTime`` of every row."""
        empty = self._spark.createDataFrame(
            [], "path string, length long, modificationTime timestamp"
        )
        known = empty
        for part in (self.features(), self.errors()):
            if part is not None:
                known = known.union(part.select(*empty.columns))
        return known

    def check_outside(self, source: str) -> None:
        """Raises if the table lies in what is read, whose files would be taken for images."""
        if self._folder.lies_in(source):
            raise OptionError(f"DEST lies in SRC, {source}: choose another one")

    def check(self, spec: FeatureSpec) -> None:
        """Raises unless the table is empty, or has features of the same fingerprint."""
        there = self.features()
        if there is None:
            if self._folder.names():
                raise OptionError(f"{self._path} exists and holds no features: choose another DEST")
            return
        try:
            check_same(provenance(there), Provenance.of(spec))
        except FingerprintError as error:
            raise FingerprintError(f"{self._path}: {error}. --overwrite replaces them") from error

    def remove(self) -> None:
        """Deletes the table; what is not a table of features stays."""
        there = self.features()
        if there is not None and provenance(there):
            self._folder.delete()

    def append(self, rows: DataFrame, errors: DataFrame) -> None:
        errors.write.mode("append").parquet(f"{self._path}/{ERRORS}")
        rows.write.mode("append").parquet(self._path)

    def take_out(self, paths: list[str]) -> None:
        """Removes the rows of some paths, by rewriting the Parquet files that hold them."""
        gone = self._spark.createDataFrame([(path,) for path in paths], "path string")
        for part, folder in (
            (self.features(), self._path),
            (self.errors(), f"{self._path}/{ERRORS}"),
        ):
            if part is None or not paths:
                continue
            holding = part.select("path", F.col("_metadata.file_path").alias("file"))
            for row in holding.join(gone, "path").select("file").distinct().collect():
                self._rewrite(unquote(row.file), folder, gone)  # Spark quotes it as a URI

    def _rewrite(self, file: str, folder: str, gone: DataFrame) -> None:
        # Where this is interrupted, rows are missing, and are done again; none is there twice.
        kept = f"{self._path}/{_KEPT}"
        rows = self._spark.read.parquet(escaped(file)).join(gone, "path", "left_anti")
        rows.coalesce(1).write.mode("overwrite").parquet(kept)
        self._folder.delete(file)
        for name in self._folder.names(_KEPT):
            if name.endswith(".parquet"):
                self._folder.move(f"{kept}/{name}", f"{folder}/{name}")
        self._folder.delete(kept)

    def _read(self, folder: str = "") -> DataFrame | None:
        if not any(name.endswith(".parquet") for name in self._folder.names(folder)):
            return None
        return self._spark.read.parquet(f"{self._path}/{folder}")


def _missing(known: DataFrame, listed: DataFrame) -> DataFrame:
    """What is listed and not known."""
    same = (
        (known["path"] == listed["path"])
        & known["length"].eqNullSafe(listed["length"])
        & known["modificationTime"].eqNullSafe(listed["modificationTime"])
    )
    return listed.join(known, same, "left_anti").orderBy("path")


def _changed(known: DataFrame, listed: DataFrame) -> list[str]:
    """The paths that are known with another length or modification time than is listed."""
    return [row.path for row in _missing(known, listed).join(known, "path", "left_semi").collect()]


def _run(
    todo: list[str],
    size: int,
    source: FileSource | TableSource,
    vectorizer: ImageVectorizer,
    table: Table,
    progress: Progress,
) -> tuple[int, Counter[str]]:
    """Does and commits chunk after chunk; returns how many rows, and how many errors by code."""
    done = 0
    codes: Counter[str] = Counter()
    with progress(len(todo)) as advance:
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]
            metrics = Metrics()
            rows = source.of(chunk).withColumnRenamed("content", "image")
            result = vectorizer.process_images(rows, "image", "result", metrics)
            result = result.drop("image").persist(StorageLevel.MEMORY_AND_DISK)
            with _watching(metrics, advance):
                done += result.count()
            features = F.col("result.features").alias("features", metadata=vectorizer.spec.metadata)
            key = ("path", "length", "modificationTime")
            bad = result.where("result.error is not null")
            table.append(
                # A null among a table's images has no features, and no error either.
                result.where("result.error is null").select(
                    *key, features, "result.width", "result.height"
                ),
                bad.select(*key, "result.error"),
            )
            codes.update(
                {
                    row.code: row["count"]
                    for row in bad.select(F.substring_index("result.error", ":", 1).alias("code"))
                    .groupBy("code")
                    .count()
                    .collect()
                }
            )
            result.unpersist()
    return done, codes


@contextmanager
def _watching(metrics: Metrics, advance: Advance) -> Iterator[None]:
    """Advances while tasks of a job end."""
    stop = threading.Event()
    seen = [0, 0]

    def look() -> None:
        value = metrics.value
        errors = sum(count for name, count in value.items() if name.startswith("errors."))
        now = [int(value.get("rows", 0)), int(errors)]
        if now != seen:
            advance(now[0] - seen[0], now[1] - seen[1])
            seen[:] = now

    def watch() -> None:
        while not stop.wait(_LOOK_EVERY_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
