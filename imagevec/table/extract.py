"""Extracts features of images into a Parquet table, in one resumable pass.

A run lists the source, subtracts the images that the table has, and computes the rest in one Spark
job. Each task commits its own files when it ends. The driver holds no list of images. The table
itself records which images are done: ``imagevec.table.dest`` explains how each row is written once.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from imagevec import cache
from imagevec.errors import OptionError
from imagevec.files import expanded
from imagevec.options import DEFAULTS, checked
from imagevec.spark.hadoop import check_has_jvm, hadoop_path
from imagevec.spark.metrics import Metrics
from imagevec.spark.sessions import active_session, failures_in_words, quoted
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.storage.listing import escaped
from imagevec.table.dest import KIND, Dest, check_outside
from imagevec.table.lock import Lock
from imagevec.table.schema import BOX_COLUMNS, OWN_COLUMNS
from imagevec.table.sources import (
    BOXES,
    IMAGE,
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

_RETRIED_ERRORS = ("timed_out", "crashed", "unreadable_path")
"""Codes whose cause may lie outside the image: the load of the machine, or what a path named."""

Progress = Callable[[int, int, int], None]
"""Called with the number of committed images, the errors among them, and the total of this run."""


@dataclass(frozen=True)
class ExtractReport:
    """The result of one run of ``extract``.

    Attributes:
        found: Images in the source.
        done_before: Images that the table already had.
        features: Vectors added to the table. With ``boxes``, an image has several.
        errors: Bad images and bad boxes added to the table's errors, by code: see
            ``imagevec.ImageError``.
        nulls: Null images, and images without boxes, added to the table's errors.
        skipped: Entries of the source that are not images, by reason.
        seconds: Duration of the run.
        fingerprint: Fingerprint of the features: see ``imagevec.provenance``.
        dest: Path or URI of the table.
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
    retry_errors: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> ExtractReport:
    """Extracts features of images into a Parquet table, except images that it already has.

        extract("photos/", "features/", recursive=True, model="resnet50")
        extract(df, "features/", column="image", key="id")
        extract(df, "features/", column="image", key="id", boxes="boxes")

    Each task commits its own files when it ends. To continue after a crash, run it again: each
    image is in the table exactly once. New and changed images are computed. Images that were
    deleted from the source keep their rows. With ``boxes``, each box has a row, and the rows of an
    image are written and replaced together.

    Args:
        src: A folder, glob or URI of image files, which the workers read. With ``column`` or
            ``format``, a table that Spark reads. Or a data frame.
        dest: A folder or URI that Spark writes. Bad images are listed in ``<dest>/_errors``.
        spark: The session; by default the active one. Spark Connect is not supported.
        recursive: Whether to include subfolders.
        pattern: A glob: only files whose names match are included.
        format: The format of the table: ``parquet`` (the default), ``orc``, ``delta``,
            ``binaryFile``, ...; ``table`` for a name in the catalog; or ``webdataset`` for shards.
        column: The column of images, of a type that ``features_udf`` accepts.
        key: A column that uniquely identifies each row, ``path`` in the result. By default
            ``path``, or the paths themselves if ``column`` contains paths.
        version: A column whose value changes when an image changes. By default a 64-bit hash of the
            bytes, and of the boxes, which requires reading them.
        where: A SQL condition that selects rows of the table.
        keep: Further columns to copy; for ``webdataset``, extensions such as ``json``.
        overwrite: Whether to replace existing features, even with another fingerprint. They stay
            until all images are computed.
        retry_errors: Whether to compute bad images again whose error may have had a passing cause:
            those with the codes ``timed_out``, ``crashed`` and ``unreadable_path``.
        progress: A function called with ``(done, errors, total)`` as tasks end, from its own
            thread.
        **options: See ``imagevec.options.Options``; ``on_error`` and ``output`` are not accepted.
            ``boxes`` names a column of a table.

    Raises:
        OptionError: An option is invalid, the source or a column does not exist, a key is null or
            not unique, or ``dest`` contains other data or is inside ``src``.
        FingerprintError: ``dest`` has features with another fingerprint.
        WeightsError: The weights cannot be loaded, or do not fit the model.
        ImageVecError: Another run is writing to ``dest``, or the job failed: a file could not be
            read (``ReadError`` in the message), the disk is full, and so on. Committed images stay.
    """
    start = time.perf_counter()
    for name in ("on_error", "output"):
        if name in options:
            raise OptionError(f"{name} is not an option of extract, which sets it itself")
    if spark is None:
        spark = src.sparkSession if isinstance(src, DataFrame) else active_session()
    check_has_jvm(spark)
    limits = checked({**DEFAULTS, **options})
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
            limits["boxes"],
            limits["read_timeout_seconds"],
            limits["max_bytes"],
        )
        own, typed = list(OWN_COLUMNS), source.kept
        if source.boxes is not None:
            options["boxes"] = BOXES
            own += BOX_COLUMNS
            typed = StructType([*typed, StructField("box", source.boxes.elementType)])
        table = Dest(spark, str(dest))
        table.check_is_table()
        options["output"] = "struct"
        vectorizer = ImageVectorizer(**options)
        weights = options.get("weights")
        file = None if weights is None else expanded(weights)
        if file is not None and file.is_file():
            cache.store(file)  # `imagevec similar` finds it by its digest
        lock = table.lock(uuid.uuid4().hex)
        with lock.held():
            table.recover(lock.previous_run)
            if overwrite:
                table.check_is_features()
            else:
                table.check(vectorizer.spec, (*own, *kept), typed)
            retried = _RETRIED_ERRORS if retry_errors else ()
            try:
                by_box = source.boxes is not None
                known = None if overwrite else table.known(retried, by_box)
                done = _add_missing(source, known, table, lock, vectorizer, progress)
            except BaseException:
                with suppress(Exception):  # else the next run does it
                    lock.check()
                    table.recover(lock.run)
                raise
            lock.check()
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
    boxes: str | None,
    timeout_seconds: float,
    max_bytes: int,
) -> Source:
    is_frame = isinstance(src, DataFrame)
    is_files = not is_frame and format is None and column is None
    of_tables = {"key": key, "version": version, "where": where, "boxes": boxes}
    of_files = {"recursive": recursive, "pattern": pattern}
    if is_files:
        _refuse(of_tables | {"keep": keep}, "tables: also give column")
        return FileSource(
            spark,
            str(src),
            recursive=recursive,
            pattern=pattern,
            timeout_seconds=timeout_seconds,
        )
    if format == "webdataset":
        _refuse(of_tables | {"column": column, "pattern": pattern}, "sources other than webdataset")
        return ShardSource(
            spark,
            str(src),
            recursive=recursive,
            keep=keep,
            timeout_seconds=timeout_seconds,
            max_bytes=max_bytes,
        )
    _refuse(of_files, "files, not for tables")
    if column is None:
        raise OptionError("column is missing: give the name of the column of images")
    if isinstance(src, DataFrame):
        if format is not None:
            raise OptionError("format is only for tables that extract reads, not for data frames")
        df = src
    elif format == "table":
        df = spark.read.table(str(src))
    else:
        df = _loaded(spark, format or "parquet", str(src))
    if where is not None:
        df = df.where(where)
    return TableSource(df, column=column, key=key, version=version, keep=keep, boxes=boxes)


# Of other formats, the source may be a name that is not a path.
_FILE_FORMATS = ("parquet", "orc", "avro", "json", "csv", "text", "binaryfile", "image", "delta")


def _loaded(spark: SparkSession, format: str, src: str) -> DataFrame:
    path = hadoop_path(spark, src) if format.lower() in _FILE_FORMATS else src
    try:
        return spark.read.format(format).load(path)
    except AnalysisException as error:
        if "[PATH_NOT_FOUND]" in str(error):
            raise OptionError(f"{src} does not exist") from error
        raise


def _refuse(given: dict[str, Any], whose: str) -> None:
    for name, value in given.items():
        if value:
            raise OptionError(f"{name} is only for {whose}")


def _add_missing(
    source: Source,
    known: DataFrame | None,
    table: Dest,
    lock: Lock,
    vectorizer: ImageVectorizer,
    progress: Progress | None,
) -> dict[str, Any]:
    """Adds the images that are not ``known``; without ``known``, replaces the table by all images.

    Returns:
        The counts of ``ExtractReport``.
    """
    source.prepare(f"{table.work}/listing/{lock.run}")
    survey, pending = _everything(source) if known is None else _pending(source, known, table, lock)
    if not survey.found:
        raise OptionError(f"no images found{_passed_over(source.skipped)}")
    metrics = Metrics()
    errors: dict[str, int] = {}
    if survey.pending:
        rows = _computed(source, source.rows(survey, pending), vectorizer, metrics)
        old = table.files() if known is None else []
        errors = _written(rows, old, table, lock, metrics, survey.pending, progress)
    return {
        "found": survey.found,
        "done_before": survey.found - survey.pending,
        "features": int(metrics.value.get("images" if source.boxes is None else "boxes", 0)),
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
    """Returns a survey where every image is pending, for an empty table."""
    found = source.keys().agg(*found_in_keys()).first()
    assert found is not None, "an aggregate has a row"
    check_keys(found.asDict())
    return Survey(found["found"], found["partitions"], pending=found["found"]), None


_KEYS = "path string, count long, partition int, is_pending boolean, is_changed boolean"


def _pending(source: Source, known: DataFrame, table: Dest, lock: Lock) -> tuple[Survey, DataFrame]:
    """Finds the pending keys. Removes the table's rows of changed images.

    Returns:
        The survey, and a data frame with the ``path`` of each pending image.
    """
    spark = known.sparkSession
    there = known.withColumnRenamed("version", "known_version").withColumn("is_known", F.lit(True))
    keys = source.keys().join(there, "path", "left")
    is_known = F.coalesce("is_known", F.lit(False))
    is_same = F.col("version").eqNullSafe(F.col("known_version")) & ~F.col("is_retried")
    is_pending = ~is_known | ~is_same
    # An empty string takes no space: all keys are written, but only the pending ones are used. They
    # are counted in the file, because AQE drops an observation together with an empty side.
    path = F.when(is_pending | (F.col("count") > 1), F.col("path")).otherwise("")
    columns = (is_pending.alias("is_pending"), (is_pending & is_known).alias("is_changed"))
    folder = f"{table.work}/pending/{lock.run}"
    keys = keys.select(path.alias("path"), "count", "partition", *columns)
    keys.write.mode("overwrite").parquet(folder)
    keys = spark.read.schema(_KEYS).parquet(escaped(folder))
    pending, changed = F.count_if("is_pending"), F.count_if("is_changed")
    found = keys.agg(*found_in_keys(), pending.alias("pending"), changed.alias("changed")).first()
    assert found is not None, "an aggregate has a row"
    check_keys(found.asDict())
    survey = Survey(found["found"], found["partitions"], found["pending"], found["changed"])
    mended = [(path,) for path in source.mended(known)]
    if survey.changed or mended:
        outdated = spark.createDataFrame(mended, "path string")
        outdated = outdated.union(keys.where("is_changed").select("path"))
        old = table.stage_without(outdated, lock.run)
        lock.check()
        table.replace(old, lock.run)
    return survey, keys.where("is_pending").select("path")


_NULL = "null"
_RESULT = "imagevec_result"
_IMAGE_ERROR = "imagevec_image_error"
_ITEMS, _ITEM = "imagevec_items", "imagevec_item"  # of boxes


def _computed(
    source: Source, rows: DataFrame, vectorizer: ImageVectorizer, metrics: Metrics
) -> DataFrame:
    """Returns the rows of the table, with their ``KIND``."""
    result = vectorizer.process_images(rows, IMAGE, _RESULT, metrics)
    if source.boxes is not None:
        result = _by_box(result, vectorizer.spec.layer_sizes)
    error = F.coalesce(SOURCE_ERROR, f"{_RESULT}.error")
    # With several layers, features is a struct, which is never null.
    is_vector = F.col(f"{_RESULT}.width").isNotNull() & error.isNull()
    return result.select(
        "path",
        "length",
        "modificationTime",
        "version",
        F.col(f"{_RESULT}.features").alias("features", metadata=vectorizer.spec.metadata),
        f"{_RESULT}.width",
        f"{_RESULT}.height",
        f"{_RESULT}.truncated",
        error.alias("error"),
        *(BOX_COLUMNS if source.boxes is not None else ()),
        *map(quoted, source.kept.names),
        F.when(is_vector, "features").otherwise("errors").alias(KIND),
    )


def _by_box(result: DataFrame, layers: Iterable[str] | None) -> DataFrame:
    """Returns a row for each box. An image without boxes, or without vectors, keeps one row.

    ``_RESULT`` is then the same struct as for images: the vector and the error are of the box.
    """
    image = F.col(_RESULT)

    def item(box: Column, number: Column) -> Column:
        features = image["features"]
        if layers is None:
            vector = features[number]
        else:
            vector = F.struct(*(features[layer][number].alias(layer) for layer in layers))
        error = image["box_errors"][number]
        return F.struct(box.alias("box"), vector.alias("features"), error.alias("error"))

    of_image = ("width", "height", "truncated")
    # Each row of the explosion copies the other columns, so that none may contain all vectors.
    rows = result.select(
        *(quoted(name) for name in result.columns if name not in (IMAGE, BOXES, _RESULT)),
        image["error"].alias(_IMAGE_ERROR),
        *(image[name].alias(f"imagevec_{name}") for name in of_image),
        F.when(image["box_errors"].isNotNull(), F.transform(BOXES, item)).alias(_ITEMS),
    )
    rows = rows.withColumn("box_count", F.when(F.size(_ITEMS) > 0, F.size(_ITEMS)))
    rows = rows.select("*", F.posexplode_outer(_ITEMS).alias("box_number", _ITEM))
    is_box = F.col("box_number").isNotNull()
    own = F.struct(
        F.col(f"{_ITEM}.features"),
        F.coalesce(_IMAGE_ERROR, f"{_ITEM}.error").alias("error"),
        *(F.when(is_box, F.col(f"imagevec_{name}")).alias(name) for name in of_image),
    )
    return rows.withColumns({"box": F.col(f"{_ITEM}.box"), _RESULT: own})


def _written(
    rows: DataFrame,
    old: list[str],
    table: Dest,
    lock: Lock,
    metrics: Metrics,
    total: int,
    progress: Progress | None,
) -> dict[str, int]:
    """Runs the job. If there are old files, replaces them at its end, and publishes nothing before.

    Returns:
        The number of errors by code.
    """
    spark = rows.sparkSession
    files: list[str] = []

    def look() -> None:
        lock.check()
        files.extend(table.publish(lock.run))  # nothing if it is staged
        if progress is not None:
            errors = sum(count for name, count in metrics.value.items() if "errors." in name)
            progress(int(metrics.value.get("rows", 0)), int(errors), total)

    spark.sparkContext.addJobTag(lock.run)
    try:
        with _watching(metrics, look, lambda: spark.sparkContext.cancelJobsWithTag(lock.run)):
            table.write(rows, lock.run, is_staged=bool(old))
    finally:
        spark.sparkContext.removeJobTag(lock.run)
    if old:
        lock.check()
        files = table.replace(old, lock.run)
    if not files:
        return {}
    code = F.coalesce(F.substring_index("error", ":", 1), F.lit(_NULL)).alias("code")
    by_code = table.read(files).select(code).groupBy("code").count()
    return {row.code: row["count"] for row in by_code.orderBy(F.desc("count"), "code").collect()}


@contextmanager
def _watching(
    metrics: Metrics, look: Callable[[], None], cancel: Callable[[], None]
) -> Iterator[None]:
    """Calls ``look`` when tasks have ended. If it fails, cancels the job and raises the error."""
    stop = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        seen = -1.0
        while not stop.wait(_LOOK_EVERY_SECONDS):
            tasks = metrics.value.get("tasks", 0.0)
            try:
                if tasks != seen:
                    look()
            except Exception as error:  # includes errors of the callback
                failures.append(error)
                cancel()
                return
            seen = tasks

    def end() -> None:
        stop.set()
        thread.join()
        if failures:
            raise failures[0]
        look()  # publishes committed files, whatever happened

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:  # it may interrupt a JVM call of either thread
        for last in (cancel, end, look):
            with suppress(Exception):
                last()
        raise
    except BaseException:
        end()
        raise
    end()
