"""``imagevec extract``: a folder or table of images to a Parquet table of features, resumably.

The table has the columns ``path``, ``length``, ``modificationTime``, ``features``, ``width`` and
``height``; what could not be read is in the table ``DEST/_errors``, with ``error`` instead of the
last three. Images are done in chunks, each of which is committed before the next. Run again, the
command does what is in neither table with the same path, length and modification time: rows of
files that were changed are taken out first, those of files that are gone stay.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from imagevec.cli.session import spark_session
from imagevec.errors import FingerprintError, OptionError, did_you_mean
from imagevec.files import content_addressed
from imagevec.spark.metrics import Metrics
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.spec import check_positive
from imagevec.table.provenance import check_same, fingerprint, metadata_of

ERRORS = "_errors"
_KEPT = "_kept"  # rows on their way from one Parquet file to another
_CHUNK_PER_CORE = 250
_SHOWN_EVERY_SECONDS = 0.25


def extract(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; the result has counts, seconds and the fingerprint."""
    chosen = {
        name: getattr(options, name)
        for name in ("model", "weights", "layer", "precision", "engine", "decode", "normalize")
        if getattr(options, name) is not None
    }
    if options.chunk_size is not None:
        check_positive("chunk_size", options.chunk_size)
    vectorizer = ImageVectorizer(**chosen, output="struct")
    if options.weights and Path(options.weights).is_file():
        content_addressed(Path(options.weights))  # `imagevec similar` finds it by its digest
    start = time.perf_counter()
    with spark_session(options.master) as spark:
        table = Table(spark, options.dest)
        table.check_outside(options.src)
        source = TableSource(spark, options) if options.column else FileSource(spark, options)
        listed = source.listed().persist(StorageLevel.MEMORY_AND_DISK)  # fails where SRC is not
        if options.overwrite:
            table.remove()
        table.check(metadata_of(vectorizer.spec))
        known = table.known()
        table.take_out(_changed(known, listed))
        todo = [row.path for row in _missing(table.known(), listed).collect()]
        found = listed.count()
        cores = spark.sparkContext.defaultParallelism
        size = options.chunk_size or _CHUNK_PER_CORE * cores
        done, errors = _run(todo, size, source, vectorizer, table, options.quiet or options.json)
    seconds = time.perf_counter() - start
    return {
        "found": found,
        "done_before": found - len(todo),
        "features": done - errors.total(),
        "errors": dict(errors.most_common()),
        "seconds": round(seconds, 1),
        "fingerprint": vectorizer.spec.fingerprint,
        "dest": options.dest,
    }


def show(result: dict[str, Any]) -> str:
    """The summary that a person reads."""
    errors: dict[str, int] = result["errors"]
    done = result["features"] + sum(errors.values())
    rate = f", {done / result['seconds']:.1f} images/s with the start" if done else ""
    lines = [
        f"{result['found']:,} images found, {result['done_before']:,} of them done before",
        f"{result['features']:,} features in {result['dest']} ({result['seconds']} s{rate})",
    ]
    if errors:
        lines.append(f"{sum(errors.values()):,} bad images in {result['dest']}/{ERRORS}:")
        lines += [f"  {code:<20} {count:,}" for code, count in errors.items()]
    return "\n".join(lines)


class Table:
    """The features and errors at one place, on whatever file system Spark knows."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._spark = spark
        self._path = path.rstrip("/")
        self._jvm: Any = spark._jvm
        self._fs = self._hadoop(self._path).getFileSystem(spark._jsc.hadoopConfiguration())

    def features(self) -> DataFrame | None:
        return self._read(self._path)

    def errors(self) -> DataFrame | None:
        return self._read(f"{self._path}/{ERRORS}")

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
        here, there = (
            path.getFileSystem(self._spark._jsc.hadoopConfiguration()).makeQualified(path)
            for path in (self._hadoop(self._path), self._hadoop(source))
        )
        if f"{here.toString()}/".startswith(f"{there.toString().rstrip('/')}/"):
            raise OptionError(f"DEST lies in SRC, {source}: choose another one")

    def check(self, metadata: dict[str, Any]) -> None:
        """Raises unless the table is empty, or has features of the same fingerprint."""
        there = self.features()
        if there is None:
            if self._entries(self._path):
                raise OptionError(f"{self._path} exists and holds no features: choose another DEST")
            return
        try:
            check_same(fingerprint(there), *metadata.values())
        except FingerprintError as error:
            raise FingerprintError(f"{self._path}: {error}. --overwrite replaces them") from error

    def remove(self) -> None:
        """Deletes the table; what is not a table of features stays."""
        there = self.features()
        if there is not None and fingerprint(there):
            self._fs.delete(self._hadoop(self._path), True)

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
        rows = self._spark.read.parquet(_escaped(file)).join(gone, "path", "left_anti")
        rows.coalesce(1).write.mode("overwrite").parquet(kept)
        self._fs.delete(self._hadoop(file), False)
        for status in self._fs.globStatus(self._hadoop(f"{kept}/part-*.parquet")):
            name = status.getPath().getName()
            self._fs.rename(status.getPath(), self._hadoop(f"{folder}/{name}"))
        self._fs.delete(self._hadoop(kept), True)

    def _read(self, path: str) -> DataFrame | None:
        if not any(name.endswith(".parquet") for name in self._entries(path)):
            return None
        return self._spark.read.parquet(path)

    def _entries(self, path: str) -> list[str]:
        if not self._fs.exists(self._hadoop(path)):
            return []
        return [status.getPath().getName() for status in self._fs.listStatus(self._hadoop(path))]

    def _hadoop(self, path: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(path)


class FileSource:
    """Image files."""

    def __init__(self, spark: SparkSession, options: argparse.Namespace) -> None:
        self._reader = spark.read.format("binaryFile")
        self._src = options.src
        self._listing = {"recursiveFileLookup": str(options.recursive).lower()}
        if options.pattern:
            self._listing["pathGlobFilter"] = options.pattern

    def listed(self) -> DataFrame:
        """``path``, ``length`` and ``modificationTime``; no file is opened."""
        files = self._reader.options(**self._listing).load(self._src)
        return files.select("path", "length", "modificationTime")

    def of(self, paths: list[str]) -> DataFrame:
        """The same with ``content``, of some of the paths."""
        return self._reader.load([_escaped(path) for path in paths])


class TableSource:
    """The rows of a table with a column of image bytes; their ``modificationTime`` is null."""

    def __init__(self, spark: SparkSession, options: argparse.Namespace) -> None:
        table = spark.read.format(options.format).load(options.src)
        for name in (options.column, options.key):
            if name not in table.columns:
                near = did_you_mean(name, table.columns)
                raise OptionError(f"{options.src} has no column {name!r}: {near}")
        self._spark = spark
        self._rows = table.select(
            F.col(options.key).cast("string").alias("path"),
            F.octet_length(options.column).cast("long").alias("length"),
            F.lit(None).cast("timestamp").alias("modificationTime"),
            F.col(options.column).alias("content"),
        )

    def listed(self) -> DataFrame:
        return self._rows.drop("content")

    def of(self, paths: list[str]) -> DataFrame:
        keys = self._spark.createDataFrame([(path,) for path in paths], "path string")
        return self._rows.join(F.broadcast(keys), "path", "left_semi")


def _escaped(path: str) -> str:
    """A path that Hadoop would else take for a glob."""
    return "".join(f"\\{letter}" if letter in "{}[]*?\\" else letter for letter in path)


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
    quiet: bool,
) -> tuple[int, Counter[str]]:
    """Does and commits chunk after chunk; returns how many rows, and how many errors by code."""
    done = 0
    codes: Counter[str] = Counter()
    with _progress(len(todo), quiet) as advance:
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]
            metrics = Metrics()
            rows = source.of(chunk).withColumnRenamed("content", "image")
            result = vectorizer.process_images(rows, "image", "result", metrics)
            result = result.drop("image").persist(StorageLevel.MEMORY_AND_DISK)
            with _watching(metrics, advance):
                done += result.count()
            features = F.col("result.features").alias(
                "features", metadata=metadata_of(vectorizer.spec)
            )
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


Advance = Callable[[int, int], None]


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Advance]:
    """A bar on the terminal; what it yields is told of more images done, and errors among them."""
    columns = (
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} images"),
        BarColumn(),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        TextColumn("{task.fields[errors]:,.0f} errors"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not total) as progress:
        bar = progress.add_task("", total=total, errors=0, rate=0.0)
        start = time.perf_counter()

        def advance(images: int, errors: int) -> None:
            task = progress.tasks[0]
            done = task.completed + images
            rate = done / (time.perf_counter() - start)
            progress.update(bar, completed=done, errors=task.fields["errors"] + errors, rate=rate)

        yield advance


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
        while not stop.wait(_SHOWN_EVERY_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
