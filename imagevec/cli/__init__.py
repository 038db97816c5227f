"""The command line: one module per command, with ``add_arguments``, ``run`` and ``show``.

Exit codes: 0 success, 1 failure (the last line states the cause), 2 usage error, 130 interrupted.
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
from imagevec.errors import ImageVecError, pyspark_required

VERBS = ("extract", "models", "similar", "duplicates", "gallery", "cache", "doctor")


class Verb(Protocol):
    """A module of this folder. Its docstring is the help text; ``run`` imports what it needs."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments of this command."""

    def run(self, options: argparse.Namespace) -> dict[str, Any]:
        """Runs the command, and returns a result that can be written as JSON."""

    def show(self, result: dict[str, Any]) -> str:
        """Formats the result as text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    options = parser().parse_args(arguments)
    verb: Verb = options.verb
    try:
        with pyspark_required():
            result = verb.run(options)
        print(json.dumps(result, indent=1) if options.json else verb.show(result), flush=True)
    except KeyboardInterrupt:
        print("imagevec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImageVecError, OSError) as error:
        print(f"imagevec: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
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
