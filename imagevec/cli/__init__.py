"""The command line: ``imagevec extract``, ``models``, ``similar``, ``gallery`` and ``doctor``.

Exit codes: 0 done, 1 it could not be done (the last line says why), 2 wrong usage, 130 interrupted.
Images that cannot be read are no failure: they are counted, and listed in a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imagevec
from imagevec.errors import ImageVecError
from imagevec.spec import DEFAULTS, PRECISIONS

Command = Callable[[argparse.Namespace], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        result = options.command(options)
    except KeyboardInterrupt:
        print("imagevec: interrupted", file=sys.stderr)
        return 130
    except (ImageVecError, OSError) as error:
        print(f"imagevec: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result, indent=1))
    elif not options.quiet:
        print(options.show(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imagevec", description="Images to feature vectors.")
    parser.add_argument("--version", action="version", version=f"imagevec {imagevec.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_extract(commands)
    _add_models(commands)
    _add_similar(commands)
    _add_gallery(commands)
    _add_doctor(commands)
    return parser


def _add(
    commands: Any, name: str, command: Command, show: Callable[[dict[str, Any]], str], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(command=command, show=show)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _add_extract(commands: Any) -> None:
    def run(options: argparse.Namespace) -> dict[str, Any]:
        from imagevec.table.extract import extract

        return extract(options)

    def show(result: dict[str, Any]) -> str:
        from imagevec.table.extract import show

        return show(result)

    parser = _add(
        commands,
        "extract",
        run,
        show,
        "Extract features of the images SRC into a Parquet table DEST; run it again to go on.",
    )
    parser.add_argument("src", help="a folder, glob or URI of images; with --column, of a table")
    parser.add_argument("dest", help="a folder or URI; bad images are listed in DEST/_errors")
    # Without a default: a saved model has its own layer, precision and so on.
    parser.add_argument(
        "--model",
        help="a name of `imagevec models`, the folder of a saved model, or a .pt2 file "
        f"(default: {DEFAULTS['model']})",
    )
    parser.add_argument("--weights", help="a weights name or file, or 'random' (default: DEFAULT)")
    parser.add_argument("--layer", help=f"(default: {DEFAULTS['layer']})")
    for name, choices in (
        ("precision", [*PRECISIONS, "auto"]),
        ("engine", ["auto", "torch", "openvino"]),
        ("decode", ["exact", "scaled"]),
    ):
        default = dict(DEFAULTS)[name]
        parser.add_argument(f"--{name}", choices=choices, help=f"(default: {default})")
    parser.add_argument(
        "--normalize", action="store_true", default=None, help="vectors of length 1"
    )
    parser.add_argument("--pattern", help="only files of such names, '*.jpg' for example")
    parser.add_argument("--recursive", action="store_true", help="subfolders, too")
    parser.add_argument("--column", help="SRC is a table, and this its column of image bytes")
    parser.add_argument("--key", default="path", help="of that table: names a row (default: path)")
    parser.add_argument("--format", default="parquet", help="of that table (default: parquet)")
    parser.add_argument("--chunk-size", type=int, help="images that are committed at a time")
    parser.add_argument("--overwrite", action="store_true", help="replace other features in DEST")
    parser.add_argument("--master", help="Spark's (default: spark-submit's, else local[*])")


def _add_models(commands: Any) -> None:
    def run(options: argparse.Namespace) -> dict[str, Any]:
        from imagevec.cli.models import models

        return {"models": models(options.search)}

    def show(result: dict[str, Any]) -> str:
        from imagevec.cli.models import show

        return show(result["models"])

    parser = _add(commands, "models", run, show, "List the models.")
    parser.add_argument("--search", default="", help="names with this in them; timm's too: 'timm/'")


def _add_similar(commands: Any) -> None:
    def run(options: argparse.Namespace) -> dict[str, Any]:
        from imagevec.search.similar import similar

        neighbours = similar(
            options.features, options.query, options.k, options.model, options.weights
        )
        return {"query": options.query, "neighbours": neighbours}

    def show(result: dict[str, Any]) -> str:
        return "\n".join(f"{row['cosine']:.4f}  {row['path']}" for row in result["neighbours"])

    parser = _add(commands, "similar", run, show, "Print the nearest images to one, by cosine.")
    parser.add_argument("features", help="a table of `imagevec extract`")
    parser.add_argument("--query", required=True, help="an image, of the table or not")
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--model", help="the table's, where that is a saved model or a .pt2 file")
    parser.add_argument("--weights", help="the table's, where they are not in the cache")


def _add_gallery(commands: Any) -> None:
    def run(options: argparse.Namespace) -> dict[str, Any]:
        from imagevec.search.gallery import write_gallery

        count = write_gallery(options.features, options.out, max_images=options.max_images)
        return {"images": count, "out": str(options.out)}

    def show(result: dict[str, Any]) -> str:
        return f"{result['images']:,} images in {result['out']}"

    parser = _add(commands, "gallery", run, show, "Write one HTML page to look at the neighbours.")
    parser.add_argument("features", help="a table of `imagevec extract`")
    parser.add_argument("--out", type=Path, default=Path("gallery.html"))
    parser.add_argument("--max-images", type=int, default=2000, help="evenly spread")


def _add_doctor(commands: Any) -> None:
    def run(options: argparse.Namespace) -> dict[str, Any]:
        from imagevec.cli.doctor import examine

        return examine(options.master)

    def show(result: dict[str, Any]) -> str:
        from imagevec.cli.doctor import show

        return show(result)

    parser = _add(commands, "doctor", run, show, "Say what this machine has and what to change.")
    parser.add_argument("--master", help="Spark's (default: spark-submit's, else local[*])")
