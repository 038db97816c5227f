"""Extracts features of images into a table, in one resumable pass.

A run lists the source, subtracts the images that the table has, and computes the rest in one Spark
job. Tasks write parts, about one a minute, which the driver publishes while the job runs. The
driver holds no list of images. The table itself records which images are done.
``imagevec.table.publish`` and ``imagevec.table.fence`` explain how each row is written once.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    BooleanType,
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
)

from imagevec import cache
from imagevec.errors import FingerprintError, ImageVecError, OptionError
from imagevec.files import expanded
from imagevec.options import DEFAULTS, checked
from imagevec.plan import Plan, make_plan
from imagevec.spark.sessions import (
    active_session,
    cancellable,
    failures_in_words,
    gpus_of_tasks,
    quoted,
    read_table,
    setting,
)
from imagevec.spark.udf import extract_in_worker, send
from imagevec.spec import FeatureSpec
from imagevec.storage.folder import Folder
from imagevec.table.catalog import CatalogTable
from imagevec.table.dest import Dest, check_outside, result_schema
from imagevec.table.fence import Fence
from imagevec.table.files import read_files, write_files
from imagevec.table.folder import FolderTable
from imagevec.table.parts import Task, open_run, write_parts
from imagevec.table.publish import NULL, Published, Publisher
from imagevec.table.schema import BOX_COLUMNS, BOXES, OWN_COLUMNS, SPARK_SCHEMA, kept_column
from imagevec.table.sources import (
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

_LOOK_EVERY_SECONDS = 1.0

_RETRIED_ERRORS = ("timed_out", "crashed", "unreadable_path")
"""Codes whose cause may lie outside the image: the load of the machine, or what a path named."""

Progress = Callable[[int, int, int], None]
"""Called with the number of published images, the errors among them, and the total of this run."""


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
    to: str = "folder",
    staging: str | Path | None = None,
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

    Tasks write what they have computed about once a minute, and the driver adds it to the table
    while the job runs. To continue after a crash, run it again: each image is in the table once.
    New and changed images are computed. Images that were deleted from the source keep their rows.
    With ``boxes``, each box has a row, and the rows of an image are written and replaced together.

    Args:
        src: A folder, glob or URI of image files, which the workers read. With ``column`` or
            ``format``, a table that Spark reads. Or a data frame.
        dest: A folder or URI that the workers can write. Bad images are listed in
            ``<dest>/_errors``. With ``to="table"``, the name of a table; bad images are listed in
            ``<dest>_errors``.
        to: ``"folder"``, or ``"table"`` for a table of the catalog that has MERGE, such as Delta or
            Iceberg. It is created if it does not exist.
        staging: With ``to="table"``, a folder or URI that the driver and the workers can write, and
            that Spark can read. Tables can share it.
        spark: The session; by default the active one.
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
            until all images are computed. A run that was killed is continued.
        retry_errors: Whether to compute bad images again whose error may have had a passing cause:
            those with the codes ``timed_out``, ``crashed`` and ``unreadable_path``.
        progress: A function called with ``(done, errors, total)`` at the start, and as images are
            published, mostly from a thread of its own.
        **options: See ``imagevec.options.Options``; ``on_error`` and ``output`` are not accepted.
            ``boxes`` names a column of a table.

    Raises:
        OptionError: An option is invalid, the source or a column does not exist, a key is null or
            not unique, or ``dest`` contains other data or is inside ``src``.
        FingerprintError: ``dest`` has features with another fingerprint.
        WeightsError: The weights cannot be loaded, or do not fit the model.
        ImageVecError: Another run is writing to ``dest``, or the job failed: a file could not be
            read (``ReadError`` in the message), the disk is full, and so on. Published images stay.
        ReadError, WriteError: The driver cannot read or write a file.
    """
    start = time.perf_counter()
    for name in ("on_error", "output"):
        if name in options:
            raise OptionError(f"{name} is not an option of extract, which sets it itself")
    if spark is None:
        spark = src.sparkSession if isinstance(src, DataFrame) else active_session()
    limits = checked({**DEFAULTS, **options})
    kept = (keep,) if isinstance(keep, str) else tuple(keep)
    _check_staging(to, staging)
    with failures_in_words():
        if not isinstance(src, DataFrame):
            check_outside(str(staging or dest), str(src))
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
        table = _dest(spark, dest, staging, limits["read_timeout_seconds"])
        table.check_is_table()
        options["output"] = "struct"
        plan = make_plan(gpus=gpus_of_tasks(spark), **options)
        send(spark, plan)
        weights = options.get("weights")
        file = None if weights is None else expanded(weights)
        if file is not None and file.is_file():
            cache.store(file)  # `imagevec similar` finds it by its digest
        fence = Fence(table.work, table.path, uuid.uuid4().hex)
        with fence.held():
            target = table
            try:
                table.recover(fence, fence.run)
                if overwrite:
                    table.check_is_features()
                    target = _replacement(table, fence, plan.spec, (*own, *kept), typed)
                else:
                    table.check(plan.spec, (*own, *kept), typed)
                retried = _RETRIED_ERRORS if retry_errors else ()
                known = target.known(retried, source.boxes is not None)
                done = _add_missing(source, known, target, fence, plan, progress)
                if overwrite and target.known() is not None:
                    table.replace_by_replacement(fence.run, fence.check)
            except BaseException:
                with suppress(Exception), fence.kept_if_it_fails():  # else the next run does it
                    fence.check()
                    table.recover(fence, fence.run)
                    target.recover(fence, fence.run)
                raise
            fence.check()
            table.remove_work(fence.run)
    return ExtractReport(
        **done,
        seconds=round(time.perf_counter() - start, 1),
        fingerprint=plan.spec.fingerprint,
        dest=str(dest),
    )


def _check_staging(to: str, staging: str | Path | None) -> None:
    if to not in ("folder", "table"):
        raise OptionError(f"to={to!r} is not known: choose 'folder' or 'table'")
    if to == "table" and staging is None:
        raise OptionError(
            "to='table' requires staging=...: a folder that the workers can write, because only "
            "the driver writes the table"
        )
    if to == "folder" and staging is not None:
        raise OptionError("staging is only for to='table': a folder needs no other one")


def _dest(
    spark: SparkSession, dest: str | Path, staging: str | Path | None, timeout_seconds: float
) -> Dest:
    if staging is None:
        return FolderTable(spark, Folder(dest, timeout_seconds))
    return CatalogTable(spark, str(dest), Folder(staging, timeout_seconds))


def _replacement(
    table: Dest, fence: Fence, spec: FeatureSpec, columns: Sequence[str], kept: StructType
) -> Dest:
    """Returns the table that replaces another one, with what a killed run has computed of it."""
    replacement = table.replacement()
    replacement.recover(fence, fence.run)
    try:
        replacement.check(spec, columns, kept)
    except (FingerprintError, OptionError):
        replacement.clear()
    return replacement


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
    else:
        df = read_table(spark, str(src), format or "parquet")
    if where is not None:
        df = df.where(where)
    return TableSource(df, column=column, key=key, version=version, keep=keep, boxes=boxes)


def _refuse(given: dict[str, Any], whose: str) -> None:
    for name, value in given.items():
        if value:
            raise OptionError(f"{name} is only for {whose}")


def _add_missing(
    source: Source,
    known: DataFrame | None,
    table: Dest,
    fence: Fence,
    plan: Plan,
    progress: Progress | None,
) -> dict[str, Any]:
    """Adds the images that are not ``known``.

    Returns:
        The counts of ``ExtractReport``.
    """
    source.prepare(table.work.sub(f"listing/{fence.run}"))
    survey, pending = (
        _everything(source) if known is None else _pending(source, known, table, fence)
    )
    if not survey.found:
        raise OptionError(f"no images found{_passed_over(source.skipped)}")
    outdated = [] if known is None else source.mended(known)
    published = Published()
    if survey.pending:
        rows = source.rows(survey, pending)
        published = _written(rows, source, table, fence, plan, survey.pending, progress)
    table.finish(fence.run, outdated, fence.check)
    errors = dict(published.errors.most_common())
    return {
        "found": survey.found,
        "done_before": survey.found - survey.pending,
        "features": published.features,
        "nulls": errors.pop(NULL, 0),
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


_KEYS = StructType(
    [
        StructField("path", StringType()),
        StructField("count", LongType()),
        StructField("partition", IntegerType()),
        StructField("is_pending", BooleanType()),
        StructField("is_changed", BooleanType()),
    ]
)


def _pending(
    source: Source, known: DataFrame, table: Dest, fence: Fence
) -> tuple[Survey, DataFrame]:
    """Finds the pending keys.

    Returns:
        The survey, and a data frame with ``path`` and ``is_changed`` of each pending image.
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
    folder = table.work.sub(f"pending/{fence.run}")
    files = write_files(keys.select(path.alias("path"), "count", "partition", *columns), folder)
    keys = read_files(spark, folder, files, _KEYS)
    found = keys.agg(*found_in_keys(), F.count_if("is_pending").alias("pending")).first()
    assert found is not None, "an aggregate has a row"
    check_keys(found.asDict())
    survey = Survey(found["found"], found["partitions"], found["pending"])
    return survey, keys.where("is_pending").select("path", "is_changed")


def _written(
    rows: DataFrame,
    source: Source,
    table: Dest,
    fence: Fence,
    plan: Plan,
    total: int,
    progress: Progress | None,
) -> Published:
    """Runs the job, and publishes the parts of its tasks while it runs."""
    spark = rows.sparkSession
    run = fence.run
    publisher = Publisher(table, fence, run)

    def look() -> None:
        if publisher.look() and progress is not None:
            done = publisher.published
            errors = sum(count for code, count in done.errors.items() if code != NULL)
            progress(done.images, errors, total)

    if progress is not None:
        progress(0, 0, total)
    task = Task(
        table.run_folder(run),
        run,
        table.published_folders(run),
        _file_metadata(rows, source, plan),
        None if plan.spec.layer_sizes is None else tuple(plan.spec.layer_sizes),
        tuple(source.kept.names),
        _codec(spark),
        time.time(),
    )

    open_run(task)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from write_in_worker(batches, task, plan)

    with (
        cancellable(spark, run) as cancel,
        _watching(look, cancel, table.wave_seconds or _LOOK_EVERY_SECONDS),
    ):
        reports = _renamed(rows, source).mapInArrow(write, "images long").collect()
    missing = sum(row.images for row in reports) - publisher.published.images
    if missing > 0:
        raise ImageVecError(
            f"{missing} images are not in {table.path}, where the tasks have written them: use a "
            "folder that the driver and all workers share"
        )
    return publisher.published


def _renamed(rows: DataFrame, source: Source) -> DataFrame:
    kept = set(source.kept.names)
    others = [name for name in rows.columns if name not in kept]
    names = enumerate(source.kept.names)
    return rows.select(*others, *(F.col(quoted(n)).alias(kept_column(i)) for i, n in names))


def write_in_worker(
    batches: Iterator[pa.RecordBatch], task: Task, plan: Plan
) -> Iterator[pa.RecordBatch]:
    """Writes the parts of a task, and yields the number of its images."""
    context = TaskContext.get()
    assert context is not None, "Spark sets it in workers"

    def extract(columns: Iterator[Any]) -> Iterator[pd.DataFrame]:
        return cast("Iterator[pd.DataFrame]", extract_in_worker(columns, plan))

    images = write_parts(batches, task, context.partitionId(), context.taskAttemptId(), extract)
    yield pa.RecordBatch.from_pydict({"images": [images]})


def _file_metadata(rows: DataFrame, source: Source, plan: Plan) -> dict[str, str]:
    """Returns the metadata of Parquet files that Spark needs to restore the columns of a table."""
    schema = result_schema(plan.spec, source.kept, source.boxes)
    return {
        "org.apache.spark.version": rows.sparkSession.version,
        SPARK_SCHEMA: schema.json(),
    }


_CODECS = {"uncompressed": "none", "lz4raw": "lz4", "lz4_raw": "lz4"}


def _codec(spark: SparkSession) -> str:
    """Returns the codec of Parquet that the session has set, as PyArrow names it."""
    name = setting(spark, "spark.sql.parquet.compression.codec", "snappy").lower()
    codec = _CODECS.get(name, name)
    return codec if codec == "none" or pa.Codec.is_available(codec) else "snappy"


@contextmanager
def _watching(
    look: Callable[[], None], cancel: Callable[[], None], seconds: float
) -> Iterator[None]:
    """Calls ``look`` every few seconds. If it fails, cancels the job and raises the error."""
    stop = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        while not stop.wait(seconds):
            try:
                look()
            except Exception as error:  # includes errors of the callback
                failures.append(error)
                cancel()
                return

    def end() -> None:
        stop.set()
        thread.join()
        if failures:
            raise failures[0]
        look()  # publishes what tasks have written, whatever happened

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:  # it may interrupt a JVM call of either thread
        for last in (cancel, end):
            with suppress(Exception):
                last()
        raise
    except BaseException:
        end()
        raise
    end()
