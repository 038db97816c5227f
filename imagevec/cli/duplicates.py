"""Find groups of near-duplicate images, and write them to a Parquet table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from imagevec.cli import features
from imagevec.errors import OptionError
from imagevec.search import METHODS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_LOOK_EVERY_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    features.add_arguments(parser)
    parser.add_argument("--out", required=True, help="output folder or URI: empty, or not existing")
    parser.add_argument(
        "--min-cosine",
        type=float,
        default=0.95,
        help="link two images whose cosine is at least this (default: 0.95)",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="exact",
        help="exact compares all pairs; clustered compares within clusters, and suits more than "
        "about 200,000 images (default: exact)",
    )
    parser.add_argument(
        "--master", help="Spark master URL (default: the one given to spark-submit, or local[*])"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from pyspark.sql import functions as F

    from imagevec.cli.session import spark_session
    from imagevec.search.joins import near_duplicates
    from imagevec.spark.sessions import spark_path
    from imagevec.storage.listing import escaped
    from imagevec.storage.location import Location
    from imagevec.table.schema import check_rows_are_images

    _check_is_empty(options.out)
    out = spark_path(Location.of(options.out))
    quiet = options.quiet or options.json
    with spark_session(options.master) as spark, _bar(spark, quiet=quiet):
        table = _table(spark, options.features, options.format)
        check_rows_are_images(options.features, table.columns)
        groups = near_duplicates(table, options.min_cosine, method=options.method)
        if "length" in table.columns:
            groups = groups.join(table.select("path", "length"), "path")
        else:
            groups = groups.withColumn("length", F.lit(None).cast("long"))
        made_by = {"min_cosine": options.min_cosine}
        groups = groups.withColumn("group", F.col("group").alias("group", metadata=made_by))
        groups.orderBy("group", "path").write.mode("append").parquet(out)
        extra = F.col("path") != F.col("group")
        counts = spark.read.parquet(escaped(out)).agg(
            F.count("*").alias("images"),
            F.count_distinct("group").alias("groups"),
            F.count_if(extra).alias("extra"),
            F.sum(F.when(extra, F.col("length"))).alias("extra_bytes"),
        )
        found = counts.first()
    assert found is not None, "an aggregate has a row"
    return {**found.asDict(), "out": options.out, "min_cosine": options.min_cosine}


def _table(spark: SparkSession, src: str, format: str | None) -> DataFrame:
    from imagevec.spark.sessions import read_table, spark_path
    from imagevec.storage.listing import escaped
    from imagevec.storage.location import Location
    from imagevec.table.read import check_has_no_log

    if format is not None:
        return read_table(spark, src, format)
    check_has_no_log(src)
    reader = spark.read.option("pathGlobFilter", "*.parquet")  # a note may be beside them
    return reader.parquet(escaped(spark_path(Location.of(src))))


def _check_is_empty(folder: str) -> None:
    from imagevec.storage.folder import Folder
    from imagevec.storage.location import UnsupportedURIError

    try:
        names = Folder(folder).names()
    except UnsupportedURIError as error:
        raise OptionError(f"--out={folder} is not valid: {error}") from error
    if names:
        raise OptionError(f"{folder} exists and is not empty: choose another --out")


def show(result: dict[str, Any]) -> str:
    if not result["groups"]:
        return f"no two images have a cosine of {result['min_cosine']} or more"
    size = result["extra_bytes"]
    bytes = "" if size is None else f" ({_size(size)})"
    return (
        f"{result['images']:,} images in {result['groups']:,} groups written to {result['out']}\n"
        f"{result['extra']:,} extra{bytes}: all but one image of each group"
    )


def _size(bytes: int) -> str:
    size, units = float(bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:,.0f} bytes" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"


@contextlib.contextmanager
def _bar(spark: SparkSession, quiet: bool) -> Iterator[None]:
    """Shows a progress bar of the tasks of running stages on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),  # the bar does not move between stages
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tasks]}"),
        # Rich's own column stops at the end of the first stage.
        TextColumn("{task.fields[elapsed]}", style="progress.elapsed"),
    )
    tracker = spark.sparkContext.statusTracker()
    is_done = threading.Event()
    start = time.perf_counter()
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        row = bar.add_task("near-duplicates", total=1, tasks="", elapsed="0:00:00")

        def look() -> None:
            while not is_done.wait(_LOOK_EVERY_SECONDS):
                stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
                running = [stage for stage in stages if stage is not None]
                fields: dict[str, Any] = {}
                if running:
                    total = sum(stage.numTasks for stage in running)
                    completed = sum(stage.numCompletedTasks for stage in running)
                    tasks = f"{completed:,} of {total:,} tasks"
                    fields = {"total": total, "completed": completed, "tasks": tasks}
                elapsed = datetime.timedelta(seconds=round(time.perf_counter() - start))
                bar.update(row, elapsed=str(elapsed), **fields)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()
