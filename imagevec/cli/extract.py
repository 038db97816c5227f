"""Extract features of the images SRC into a Parquet table DEST; run it again to continue."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.options import OPTIONS, check_positive

if TYPE_CHECKING:
    from imagevec.table.extract import Advance

# What a table has of each image: its error beside the vector's place, and one vector.
_FIXED = ("on_error", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", help="a folder, glob or URI of images; with --column, of a table")
    parser.add_argument("dest", help="a folder or URI; bad images are listed in DEST/_errors")
    for option in OPTIONS:
        if option.name in _FIXED:
            continue
        # Without a default: a saved model has its own layer, precision and so on.
        settings: dict[str, Any] = {"help": f"{option.help} (default: {_shown(option.default)})"}
        if option.kind == "flag":
            settings |= {"action": "store_true", "default": None}
        elif option.kind == "choice":
            settings["choices"] = option.choices
        elif option.kind == "names":
            settings |= {"type": _names, "metavar": "A,B"}
        elif option.kind in ("count", "auto_or_count"):
            settings["type"] = _count
        parser.add_argument(f"--{option.name.replace('_', '-')}", **settings)
    parser.add_argument("--pattern", help="only files whose names match, '*.jpg' for example")
    parser.add_argument("--recursive", action="store_true", help="include subfolders")
    parser.add_argument("--column", help="SRC is a table, and this its column of image bytes")
    parser.add_argument(
        "--key", default="path", help="column that uniquely identifies each row (default: path)"
    )
    parser.add_argument("--format", default="parquet", help="of the table SRC (default: parquet)")
    parser.add_argument("--chunk-size", type=int, help="images that are committed at a time")
    parser.add_argument("--overwrite", action="store_true", help="replace other features in DEST")
    parser.add_argument(
        "--master", help="Spark's master URL (default: spark-submit's, else local[*])"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from imagevec import cache
    from imagevec.cli.session import spark_session
    from imagevec.spark.vectorizer import ImageVectorizer
    from imagevec.table.extract import Table, extract
    from imagevec.table.sources import FileSource, TableSource

    if options.chunk_size is not None:
        check_positive("chunk_size", options.chunk_size)
    chosen = {option.name: getattr(options, option.name, None) for option in OPTIONS}
    given: Any = {name: value for name, value in chosen.items() if value is not None}
    vectorizer = ImageVectorizer(**{**given, "output": "struct"})
    if options.weights and Path(options.weights).is_file():
        cache.store(Path(options.weights))  # `imagevec similar` finds it by its digest
    start = time.perf_counter()
    with spark_session(options.master) as spark:
        table = Table(spark, options.dest)
        table.check_outside(options.src)
        source: FileSource | TableSource
        if options.column:
            source = TableSource(
                spark, options.src, column=options.column, key=options.key, format=options.format
            )
        else:
            source = FileSource(
                spark, options.src, recursive=options.recursive, pattern=options.pattern
            )
        progress = functools.partial(_bar, quiet=options.quiet or options.json)
        done = extract(
            spark, source, table, vectorizer, progress, options.chunk_size, options.overwrite
        )
    return {
        "found": done.found,
        "done_before": done.done_before,
        "features": done.features,
        "errors": dict(done.errors.most_common()),
        "seconds": round(time.perf_counter() - start, 1),
        "fingerprint": vectorizer.spec.fingerprint,
        "dest": options.dest,
    }


def show(result: dict[str, Any]) -> str:
    """The summary that a person reads."""
    errors: dict[str, int] = result["errors"]
    done = result["features"] + sum(errors.values())
    rate = f", {done / result['seconds']:.1f} images/s including startup" if done else ""
    lines = [
        f"{result['found']:,} images found, {result['done_before']:,} already done",
        f"{result['features']:,} features in {result['dest']} ({result['seconds']} s{rate})",
    ]
    if errors:
        lines.append(f"{sum(errors.values()):,} bad images in {result['dest']}/_errors:")
        lines += [f"  {code:<20} {count:,}" for code, count in errors.items()]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return {False: "no"}.get(default, str(default)) if isinstance(default, bool) else str(default)


def _names(text: str) -> list[str]:
    return text.split(",")


def _count(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Advance]:
    """A progress bar on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
