"""The command line: one module per command, with ``add_arguments``, ``run`` and ``show``.

Exit codes: 0 success, 1 failure (the last line states the cause), 2 usage error, 130 interrupted.
Without a command, the help is printed. Options cannot be abbreviated.
Images that cannot be read are not a failure: they are counted and listed in a table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

from imagevec._version import __version__
from imagevec.errors import ImageVecError, did_you_mean, pyspark_required

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
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser().print_help()
        return 0
    options = _parsed(arguments)
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


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments. Exits if they are wrong, with the nearest valid names."""
    top = parser()
    first = arguments[0]
    if not first.startswith("-") and first not in VERBS:
        top.error(f"unknown command {first!r}: {did_you_mean(first, VERBS)}")
    if first.startswith("-") and first not in _names(top):
        top.error(_unknown(first, top))
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        options.parser.error(_unknown(unknown[0], options.parser))
    return options


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"unknown argument {argument!r}"
    name = argument.partition("=")[0]
    return f"unknown option {name!r}: {did_you_mean(name, _names(parser))}"


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take three lines."""

    def error(self, message: str) -> NoReturn:
        help = f"run {self.prog} --help for help"
        self.exit(2, f"{self.format_usage()}{self.prog}: {message}\n{help}\n")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = _Parser(
        prog="imagevec",
        usage="%(prog)s COMMAND [options]",
        description="Turn images into feature vectors, and search them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"imagevec {__version__}")
    verbs = parser.add_subparsers(prog=parser.prog, required=True, metavar="COMMAND")
    for name in VERBS:
        verb = cast(Verb, importlib.import_module(f"imagevec.cli.{name}"))
        help = (verb.__doc__ or "").partition("\n")[0]
        arguments = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        arguments.set_defaults(verb=verb, parser=arguments)
        arguments.add_argument(
            "--json", action="store_true", help="print the result as JSON, without a progress bar"
        )
        arguments.add_argument("--quiet", action="store_true", help="show no progress bar")
        verb.add_arguments(arguments)
        names = [action.metavar or action.dest for action in arguments._get_positional_actions()]
        arguments.usage = " ".join([arguments.prog, *map(str, names), "[options]"])
    return parser
