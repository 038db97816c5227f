"""Images to a Parquet table of features, in one pass that can be cut off and continued.

List what there is, subtract what the table has, compute the rest in one Spark job, and let each
task commit its own files when it ends. The driver holds no list of images, and what is done is what
is in the table: see ``imagevec.table.dest`` for how a row gets there once.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from imagevec import cache
from imagevec.errors import OptionError
from imagevec.options import DEFAULTS, checked
from imagevec.spark.hadoop import check_has_jvm
from imagevec.spark.metrics import Metrics
from imagevec.spark.sessions import active_session, failures_in_words, quoted
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.table.dest import KIND, Dest, check_outside
from imagevec.table.listing import escaped
from imagevec.table.lock import Lock
from imagevec.table.sources import (
    IMAGE,
    OWN_COLUMNS,
    SOURCE_ERROR,
    FileSource,
    ShardSource,
    Source,
    Survey,
    TableSource,
    check_keys,
    found_in_keys,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from imagevec.options import Options

_LOOK_EVERY_SECONDS = 0.25

Progress = Callable[[int, int, int], None]
"""Called with the images that are committed, the errors among them, and how many are to do."""


@dataclass(frozen=True)
class ExtractReport:
    """What one run of ``extract`` did.

    Attributes:
        found: Images in the source.
        done_before: Those of them that the table had.
        features: Vectors that were added to it.
        errors: Bad images that were added to its errors, by code: see ``imagevec.ImageError``.
        nulls: Nulls of a table that were added there, too.
        skipped: What is in the source and counts as no image, by reason.
        seconds: That it took.
        fingerprint: Of the features: see ``imagevec.provenance``.
        dest: Where the table is.
    """

    found: int
    done_before: int
    features: int
    errors: dict[str, int]
    nulls: int
    skipped: dict[str, int]
    seconds: float
    fingerprint: str
    dest: str


def extract(
    src: str | Path | DataFrame,
    dest: str | Path,
    *,
    spark: SparkSession | None = None,
    recursive: bool = False,
    pattern: str | None = None,
    format: str | None = None,
    column: str | None = None,
    key: str | None = None,
    version: str | None = None,
    where: str | None = None,
    keep: str | Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> ExtractReport:
    """Adds to a Parquet table of features what it lacks of a source.

        extract("photos/", "features/", recursive=True, model="resnet50")
        extract(df, "features/", column="image", key="id")

    Each task commits its own files as it ends. Run it again to continue, after a crash too: each
    image is in the table once. Images that are new or have changed are done, images that are gone
    keep their rows.

    Args:
        src: A folder, a glob or a URI of image files, which the workers read. With ``column`` or
            ``format``, a table for Spark to read; or a data frame.
        dest: A folder or URI for Spark to write. Bad images are in ``<dest>/_errors``.
        spark: The session; by default the active one. Not of Spark Connect.
        recursive: Include subfolders.
        pattern: Only files whose names match this glob.
        format: Of the table: ``parquet`` (the default), ``orc``, ``delta``, ``binaryFile``, ...;
            ``table`` for a name in the catalog; or ``webdataset`` for shards.
        column: Of images, of a type that ``features_udf`` takes.
        key: A column that identifies each row, ``path`` in the result. By default ``path``, or the
            paths themselves if ``column`` holds any.
        version: A column whose value is another one where an image has changed. By default a
            64-bit hash of the bytes, which takes reading them.
        where: A condition in SQL: only these rows of the table.
        keep: Further columns to keep; of ``webdataset``, extensions such as ``json``.
        overwrite: Replace features of another fingerprint.
        progress: Called with ``(done, errors, total)`` as tasks end, from a thread of its own.
        **options: See ``imagevec.options.Options``, but for ``on_error`` and ``output``.

    Raises:
        OptionError: An option is wrong, the source or a column does not exist, a key is null or
            not unique, or ``dest`` holds something else or lies in ``src``.
        FingerprintError: ``dest`` has features of another fingerprint.
        WeightsError: The weights cannot be had, or do not fit the model.
        ImageVecError: Another run writes to ``dest``, or the job failed: a file could not be read
            (``ReadError`` in the message), the disk is full, and so on. What was committed stays.
    """
    start = time.perf_counter()
    for name in ("on_error", "output"):
        if name in options:
            raise OptionError(f"{name} is not an option of extract: the table fixes it")
    if spark is None:
        spark = src.sparkSession if isinstance(src, DataFrame) else active_session()
    check_has_jvm(spark)
    timeout_seconds = checked({**DEFAULTS, **options})["read_timeout_seconds"]
    kept = (keep,) if isinstance(keep, str) else tuple(keep)
    with failures_in_words():
        if not isinstance(src, DataFrame):
            check_outside(str(dest), str(src))
        source = _source(
            spark,
            src,
            recursive,
            pattern,
            format,
            column,
            key,
            version,
            where,
            kept,
            timeout_seconds,
        )
        table = Dest(spark, str(dest))
        table.check_is_table()
        options["output"] = "struct"
        vectorizer = ImageVectorizer(**options)
        weights = options.get("weights")
        if weights is not None and Path(weights).is_file():
            cache.store(Path(weights))  # `imagevec similar` finds it by its digest
        lock = table.lock(uuid.uuid4().hex)
        with lock.held():
            table.recover(lock.previous_run)
            if overwrite:
                table.clear()
            table.check(vectorizer.spec, (*OWN_COLUMNS, *kept))
            try:
                done = _add_missing(source, table, lock, vectorizer, kept, progress)
            except BaseException:
                with suppress(Exception):  # or the next run does it
                    lock.check()
                    table.publish(lock.run)
                    table.remove_work()
                raise
            table.remove_work()
    return ExtractReport(
        **done,
        seconds=round(time.perf_counter() - start, 1),
        fingerprint=vectorizer.spec.fingerprint,
        dest=str(dest),
    )


def _source(
    spark: SparkSession,
    src: str | Path | DataFrame,
    recursive: bool,
    pattern: str | None,
    format: str | None,
    column: str | None,
    key: str | None,
    version: str | None,
    where: str | None,
    keep: tuple[str, ...],
    timeout_seconds: float,
) -> Source:
    is_frame = isinstance(src, DataFrame)
    is_files = not is_frame and format is None and column is None
    of_tables = {"key": key, "version": version, "where": where}
    of_files = {"recursive": recursive, "pattern": pattern}
    if is_files:
        _refuse(of_tables | {"keep": keep}, "a table: give its column, too")
        return FileSource(
            spark,
            str(src),
            recursive=recursive,
            pattern=pattern,
            timeout_seconds=timeout_seconds,
        )
    if format == "webdataset":
        _refuse(of_tables | {"column": column, "pattern": pattern}, "other sources")
        return ShardSource(
            spark, str(src), recursive=recursive, keep=keep, timeout_seconds=timeout_seconds
        )
    _refuse(of_files, "files, not for a table")
    if column is None:
        raise OptionError("which column holds the images? give column")
    if isinstance(src, DataFrame):
        if format is not None:
            raise OptionError("format is for a table that is to be read, not for a data frame")
        df = src
    elif format == "table":
        df = spark.read.table(str(src))
    else:
        df = _loaded(spark, format or "parquet", str(src))
    if where is not None:
        df = df.where(where)
    return TableSource(df, column=column, key=key, version=version, keep=keep)


def _loaded(spark: SparkSession, format: str, src: str) -> DataFrame:
    try:
        return spark.read.format(format).load(src)
    except AnalysisException as error:
        if "[PATH_NOT_FOUND]" in str(error):
            raise OptionError(f"{src} does not exist") from error
        raise


def _refuse(given: dict[str, Any], whose: str) -> None:
    for name, value in given.items():
        if value:
            raise OptionError(f"{name} is for {whose}")


def _add_missing(
    source: Source,
    table: Dest,
    lock: Lock,
    vectorizer: ImageVectorizer,
    kept: tuple[str, ...],
    progress: Progress | None,
) -> dict[str, Any]:
    """Returns the counts of ``ExtractReport``."""
    source.prepare(f"{table.work}/listing")
    known = table.known()
    survey, pending = _everything(source) if known is None else _pending(source, known, table)
    if not survey.found:
        raise OptionError(f"there are no images{_passed_over(source.skipped)}")
    metrics = Metrics()
    errors: dict[str, int] = {}
    if survey.pending:
        rows = _computed(source.rows(survey, pending), vectorizer, metrics, kept)
        errors = _written(rows, table, lock, metrics, survey.pending, progress)
    return {
        "found": survey.found,
        "done_before": survey.found - survey.pending,
        "features": int(metrics.value.get("images", 0)),
        "nulls": errors.pop(_NULL, 0),
        "errors": errors,
        "skipped": dict(source.skipped),
    }


def _passed_over(skipped: dict[str, int]) -> str:
    if not skipped:
        return ""
    hint = ": recursive=True includes subfolders" if "subfolder" in skipped else ""
    return f" ({', '.join(f'{count} {reason}' for reason, count in skipped.items())}){hint}"


def _everything(source: Source) -> tuple[Survey, None]:
    """Where nothing is known, every image is to do."""
    found = source.keys().agg(*found_in_keys()).first()
    assert found is not None, "an aggregate has a row"
    check_keys(found.asDict())
    return Survey(found["found"], found["partitions"], pending=found["found"]), None


def _pending(source: Source, known: DataFrame, table: Dest) -> tuple[Survey, DataFrame]:
    """The keys to do, by one job. Rows that were done in another version are taken out.

    Returns:
        The survey, and a data frame with the ``path`` of each.
    """
    spark = known.sparkSession
    there = known.withColumnRenamed("version", "known_version").withColumn("is_known", F.lit(True))
    found, counts = Observation(), Observation()
    keys = source.keys().observe(found, *found_in_keys()).join(there, "path", "left")
    is_changed = F.coalesce("is_known", F.lit(False))
    keys = keys.where(~is_changed | ~F.col("version").eqNullSafe(F.col("known_version")))
    keys = keys.select("path", is_changed.alias("changed"))
    keys = keys.observe(
        counts, F.count("*").alias("pending"), F.count_if("changed").alias("changed")
    )
    folder = f"{table.work}/pending"
    keys.write.mode("overwrite").parquet(folder)
    check_keys(found.get)
    survey = Survey(found.get["found"], found.get["partitions"], **counts.get)
    pending = spark.read.schema("path string, changed boolean").parquet(escaped(folder))
    mended = [(path,) for path in source.mended(known)]
    if survey.changed or mended:
        outdated = spark.createDataFrame(mended, "path string")
        table.take_out(outdated.union(pending.where("changed").select("path")))
    return survey, pending


_NULL = "null"
_RESULT = "imagevec_result"


def _computed(
    rows: DataFrame, vectorizer: ImageVectorizer, metrics: Metrics, kept: tuple[str, ...]
) -> DataFrame:
    result = vectorizer.process_images(rows, IMAGE, _RESULT, metrics)
    return result.select(
        "path",
        "length",
        "modificationTime",
        "version",
        F.col(f"{_RESULT}.features").alias("features", metadata=vectorizer.spec.metadata),
        f"{_RESULT}.width",
        f"{_RESULT}.height",
        F.coalesce(SOURCE_ERROR, f"{_RESULT}.error").alias("error"),
        *map(quoted, kept),
        # Of several layers, features are never null themselves.
        F.when(F.col(f"{_RESULT}.width").isNotNull(), "features").otherwise("errors").alias(KIND),
    )


def _written(
    rows: DataFrame,
    table: Dest,
    lock: Lock,
    metrics: Metrics,
    total: int,
    progress: Progress | None,
) -> dict[str, int]:
    """Runs the job; returns how many errors there are by code."""
    spark = rows.sparkSession
    files: list[str] = []

    def look() -> None:
        lock.check()
        files.extend(table.publish(lock.run))
        if progress is not None:
            errors = sum(count for name, count in metrics.value.items() if "errors." in name)
            progress(int(metrics.value.get("rows", 0)), int(errors), total)

    spark.sparkContext.addJobTag(lock.run)
    try:
        with _watching(metrics, look, lambda: spark.sparkContext.cancelJobsWithTag(lock.run)):
            table.write(rows, lock.run)
    finally:
        spark.sparkContext.removeJobTag(lock.run)
    if not files:
        return {}
    code = F.coalesce(F.substring_index("error", ":", 1), F.lit(_NULL)).alias("code")
    by_code = table.read(files).select(code).groupBy("code").count()
    return {row.code: row["count"] for row in by_code.orderBy(F.desc("count"), "code").collect()}


@contextmanager
def _watching(
    metrics: Metrics, look: Callable[[], None], cancel: Callable[[], None]
) -> Iterator[None]:
    """Looks whenever tasks have ended. Where that fails, it cancels the job and raises why."""
    stop = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        seen = -1.0
        while not stop.wait(_LOOK_EVERY_SECONDS):
            tasks = metrics.value.get("tasks", 0.0)
            try:
                if tasks != seen:
                    look()
            except Exception as error:  # of the callback, too
                failures.append(error)
                cancel()
                return
            seen = tasks

    def end() -> None:
        stop.set()
        thread.join()
        if failures:
            raise failures[0]
        look()  # what was committed stays, whatever happened

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:  # it may break what either thread just asks the JVM
        for last in (cancel, end, look):
            with suppress(Exception):
                last()
        raise
    except BaseException:
        end()
        raise
    end()
