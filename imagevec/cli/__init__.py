"""The command line: one module for each verb, with ``add_arguments``, ``run`` and ``show``.

Exit codes: 0 success, 1 failure (the last line says why), 2 wrong usage, 130 interrupted.
Images that cannot be read are not a failure: they are counted and listed in a table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

from imagevec._version import __version__
from imagevec.errors import ImageVecError

VERBS = ("extract", "models", "similar", "duplicates", "gallery", "cache", "doctor")


class Verb(Protocol):
    """A module of this folder: its docstring is its help, and ``run`` imports what it needs."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its own arguments."""

    def run(self, options: argparse.Namespace) -> dict[str, Any]:
        """Does it; the result can be written as JSON."""

    def show(self, result: dict[str, Any]) -> str:
        """The result for a person."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    options = parser().parse_args(arguments)
    verb: Verb = options.verb
    try:
        result = verb.run(options)
        print(json.dumps(result, indent=1) if options.json else verb.show(result), flush=True)
    except KeyboardInterrupt:
        print("imagevec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has enough, `head` for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImageVecError, OSError) as error:
        print(f"imagevec: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All verbs, with their arguments."""
    parser = argparse.ArgumentParser(
        prog="imagevec", description="Turn images into feature vectors, and search them."
    )
    parser.add_argument("--version", action="version", version=f"imagevec {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in VERBS:
        verb = cast(Verb, importlib.import_module(f"imagevec.cli.{name}"))
        help = (verb.__doc__ or "").partition("\n")[0]
        arguments = verbs.add_parser(name, help=help, description=help)
        arguments.set_defaults(verb=verb)
        arguments.add_argument(
            "--json", action="store_true", help="print the result as JSON, without a progress bar"
        )
        arguments.add_argument("--quiet", action="store_true", help="show no progress bar")
        verb.add_arguments(arguments)
    return parser
