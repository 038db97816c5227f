"""Find the images of a table that are most similar to a query image."""

from __future__ import annotations

import argparse
from typing import Any

from imagevec.cli import features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    features.add_arguments(parser)
    parser.add_argument(
        "--query",
        dest="queries",
        metavar="QUERY",
        action="append",
        default=[],
        help="query image, in the table or not; repeat for several",
    )
    parser.add_argument(
        "--text",
        dest="texts",
        metavar="TEXT",
        action="append",
        default=[],
        help="query text, for features of an open_clip model; repeat for several",
    )
    parser.add_argument("-k", type=int, default=10, help="neighbours per query (default: 10)")
    parser.add_argument("--model", help="folder, .onnx or .pt2 file that the table was made with")
    parser.add_argument(
        "--weights", help="weights that the table was made with, if not in the cache"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from imagevec.errors import OptionError
    from imagevec.search.similar import similar

    if not options.queries and not options.texts:
        raise OptionError("no query: give --query IMAGE or --text TEXT")
    with features.folder_of(options) as folder:
        found = similar(
            folder, options.queries, options.k, options.model, options.weights, options.texts
        )
    return {"queries": found}


def show(result: dict[str, Any]) -> str:
    return "\n\n".join(_table(**query) for query in result["queries"])


def _table(query: str, neighbours: list[dict[str, Any]]) -> str:
    rows = [
        f"{rank:>4}  {row['cosine']:>7.4f}  {row['path']}"
        for rank, row in enumerate(neighbours, start=1)
    ]
    return "\n".join([query, "rank   cosine  path", *rows])
