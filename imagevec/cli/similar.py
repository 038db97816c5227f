"""Print the images nearest to one, by cosine."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("features", help="a table of `imagevec extract`")
    parser.add_argument("--query", required=True, help="an image, of the table or not")
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--model", help="the table's, where that is a saved model or a .pt2 file")
    parser.add_argument("--weights", help="the table's, where they are not in the cache")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from imagevec.search.similar import similar

    found = similar(options.features, options.query, options.k, options.model, options.weights)
    return {"query": options.query, "neighbours": found}


def show(result: dict[str, Any]) -> str:
    return "\n".join(f"{row['cosine']:.4f}  {row['path']}" for row in result["neighbours"])
