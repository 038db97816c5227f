"""Extract features of images into a table; run it again to continue."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from imagevec._version import __version__
from imagevec.errors import ImageVecError, MissingExtraError
from imagevec.options import OPTIONS, Option

if TYPE_CHECKING:
    from imagevec.table.extract import Progress

# Fixed by the table, which has a vector or an error for each image.
_FIXED = ("on_error", "output")

_OF_SOURCES = (
    *("recursive", "pattern", "format", "column", "key", "version", "where", "keep"),
    *("overwrite", "retry_errors", "to", "staging"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", metavar="SRC", help="folder, glob or URI of image files; with --column, of a table"
    )
    parser.add_argument(
        "dest", metavar="DEST", help="output folder or URI; bad images are listed in DEST/_errors"
    )
    for option in OPTIONS:
        if option.name in _FIXED:
            continue
        # No default: a saved model has its own layer, precision and so on.
        settings: dict[str, Any] = {"help": f"{option.help}{_shown(option)}"}
        if option.kind == "flag":
            settings |= {"action": "store_true", "default": None}
        elif option.kind == "choice":
            settings["choices"] = option.choices
        elif option.kind == "names":
            settings |= {"type": _names, "metavar": "A,B"}
        elif option.kind == "size":
            settings |= {"type": _size, "metavar": "SIDE|HEIGHTxWIDTH"}
        elif option.kind == "range":
            settings |= {"type": _range, "metavar": "LOW,HIGH"}
        elif option.kind in ("count", "auto_or_count"):
            settings["type"] = _count
        parser.add_argument(f"--{option.name.replace('_', '-')}", **settings)
    parser.add_argument(
        "--to",
        default="folder",
        help="folder (the default), or table: DEST is then the name of a table of the catalog that "
        "has MERGE, such as Delta or Iceberg; bad images are listed in the table DEST_errors",
    )
    parser.add_argument(
        "--staging",
        metavar="FOLDER",
        help="with --to table, a folder that driver and workers can write, and Spark can read",
    )
    parser.add_argument("--pattern", help="only files whose names match, such as '*.jpg'")
    parser.add_argument("--recursive", action="store_true", help="include subfolders")
    parser.add_argument("--column", help="column of images or paths; SRC is then read as a table")
    parser.add_argument(
        "--format",
        help="format of the table SRC, such as orc or delta; table for a name in the catalog, "
        "webdataset for tar shards (default: parquet)",
    )
    parser.add_argument(
        "--key", help="column that uniquely identifies each row (default: path, or --column)"
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs="?",
        metavar="COLUMN",
        help="column that changes when an image changes (default: a hash of its bytes); without a "
        "column, print the version of imagevec and exit",
    )
    parser.add_argument("--where", help="only rows that meet this SQL condition")
    parser.add_argument(
        "--keep",
        type=_names,
        metavar="A,B",
        default=(),
        help="further columns to copy into the table; for webdataset, extensions such as json",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the features in DEST")
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="compute bad images again if the error may have had a passing cause: timed_out, "
        "crashed, unreadable_path",
    )
    parser.add_argument(
        "--master", help="Spark master URL (default: the one given to spark-submit, or local[*])"
    )


class _Version(argparse.Action):
    """The column of versions. Alone, the flag does what ``imagevec --version`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        namespace, column, _ = arguments
        if column is None:
            print(f"imagevec {__version__}")
            parser.exit()
        setattr(namespace, self.dest, column)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from imagevec.cli.session import spark_session
    from imagevec.table.extract import extract

    chosen = {option.name: getattr(options, option.name, None) for option in OPTIONS}
    given: Any = {name: value for name, value in chosen.items() if value is not None}
    given |= {name: getattr(options, name) for name in _OF_SOURCES}
    start = time.perf_counter()
    try:
        with (
            spark_session(options.master) as spark,
            _bar(quiet=options.quiet or options.json) as progress,
        ):
            report = extract(options.src, options.dest, spark=spark, progress=progress, **given)
    except MissingExtraError:
        raise  # names no option
    except ImageVecError as error:
        raise type(error)(_in_flags(str(error))) from error
    seconds = round(time.perf_counter() - start, 1)  # including the startup of Spark
    bad_images = f"{report.dest}_errors" if options.to == "table" else f"{report.dest}/_errors"
    own = {"seconds": seconds, "src": options.src, "bad_images": bad_images}
    return dataclasses.asdict(report) | own


def show(result: dict[str, Any]) -> str:
    """Formats the summary as text."""
    errors: dict[str, int] = result["errors"]
    bad = sum(errors.values())
    done = result["found"] - result["done_before"]  # an image may have many vectors
    rate = f", {done / result['seconds']:.1f} images/s including startup" if done else ""
    features = _counted(result["features"], "vector")
    lines = [
        f"{_counted(result['found'], 'image')} found, {result['done_before']:,} already done",
        f"{features} written to {result['dest']} ({result['seconds']} s{rate})",
    ]
    if bad:
        what = "bad images and boxes" if "bad_box" in errors else _noun(bad, "bad image")
        lines.append(f"{bad:,} {what} listed in {result['bad_images']}:")
        lines += [f"  {code:<20} {count:,}" for code, count in errors.items()]
    if result["nulls"]:
        lines.append(f"{_counted(result['nulls'], 'null')} in {result['bad_images']}")
    if result["skipped"]:
        reasons = [f"{reason} {count:,}" for reason, count in result["skipped"].items()]
        lines.append(f"skipped in {result['src']}: {', '.join(reasons)}")
    return "\n".join(lines)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {_noun(number, noun)}"


def _noun(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"


def _in_flags(message: str) -> str:
    """Rewrites the options in a message as flags: ``--weights FILE`` for ``weights='FILE'``."""
    names = "|".join([option.name for option in OPTIONS] + list(_OF_SOURCES))
    flag = re.compile(rf"\b({names})=(?:(['\"])(.*?)\2|([\w.]+)|\((\d+), (\d+)\))")

    def written(match: re.Match[str]) -> str:
        value = match[3] if match[2] else match[4] or f"{match[5]}x{match[6]}"
        name = f"--{match[1].replace('_', '-')}"
        return name if value == "True" else f"{name} {value}"

    return flag.sub(written, message)


def _shown(option: Option) -> str:
    default = option.default
    if option.kind == "size":
        return " (default: the model's own)"
    if default is None:
        return ""
    shown = ",".join(default) or "none" if isinstance(default, tuple) else default
    return f" (default: {'no' if default is False else shown})"


def _size(text: str) -> int | str | list[int | str]:
    sides = [_count(side) for side in text.split("x")]
    return sides[0] if len(sides) == 1 else sides


def _range(text: str) -> list[float] | str:
    try:
        return [float(end) for end in text.split(",")]
    except ValueError:
        return text


def _names(text: str) -> list[str]:
    return text.split(",")


def _count(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Progress]:
    """Shows a progress bar of the published images on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} images"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[errors]}"),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
    )
    progress = Progress(*columns, console=Console(stderr=True, quiet=quiet), disable=quiet)
    with contextlib.ExitStack() as shown:
        bar = progress.add_task("", total=1, rate="", errors="", left="")
        start = first = time.perf_counter()
        at_first = 0

        def advance(done: int, errors: int, total: int) -> None:
            nonlocal start, first, at_first
            if not progress.live.is_started:
                shown.enter_context(progress)  # not earlier: it would leave an empty line
            now = time.perf_counter()
            fields: dict[str, Any] = {"rate": "", "left": "", "errors": _counted(errors, "error")}
            if not done:
                start = now
            elif not at_first:
                at_first, first = done, now
            if done:
                # The first parts include the startup of the workers. They are excluded from the
                # rate once as many images again are done.
                is_later = done >= 2 * at_first
                rate = (done - at_first) / (now - first) if is_later else done / (now - start)
                left = datetime.timedelta(seconds=round((total - done) / rate))
                fields |= {"rate": f"{rate:.1f} images/s", "left": f"{left} left"}
            progress.update(bar, completed=done, total=total, **fields)

        yield advance
