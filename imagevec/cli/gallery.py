"""Write an HTML page that shows the images of a table and their nearest neighbours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imagevec.cli import features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    features.add_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gallery.html"),
        help="HTML file to write (default: gallery.html)",
    )
    parser.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        default=2000,
        help="show at most N images, sampled by a hash of the path (default: 2000)",
    )
    parser.add_argument(
        "--groups",
        help="table written by `imagevec duplicates`: show its groups, and sample their images "
        "first",
    )
    parser.add_argument(
        "--allowed-roots",
        type=lambda text: text.split(","),
        metavar="A,B",
        default=[],
        help="folders and URI prefixes under which images may be read, separated by commas "
        "(default: anywhere)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from imagevec.search.gallery import write_gallery

    with features.folder_of(options) as folder:
        count = write_gallery(
            folder,
            options.out,
            max_images=options.max_images,
            groups=options.groups,
            allowed_roots=options.allowed_roots,
        )
    return {"images": count, "out": str(options.out)}


def show(result: dict[str, Any]) -> str:
    return f"{result['images']:,} images in {result['out']}"
