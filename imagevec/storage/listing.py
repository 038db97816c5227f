"""Lists the image files of a folder, a glob or a URI, without opening them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from imagevec.errors import OptionError, ReadError
from imagevec.options import DEFAULTS
from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.retry import retried
from imagevec.storage.stores import Entry, store_of

_GLOB = re.compile(r"[*?\[{]")


class Listed(NamedTuple):
    """A file, or an entry that is skipped.

    Attributes:
        path: Absolute path or URI.
        length: Size in bytes.
        modified: Modification time in microseconds since 1970 UTC, if the store reports it.
        skipped: The reason why it is skipped; ``None`` for a file.
    """

    path: str
    length: int = 0
    modified: int | None = None
    skipped: str | None = None


def check_exists(src: str, timeout_seconds: float = DEFAULTS["read_timeout_seconds"]) -> None:
    """Checks that a source exists, without listing folders.

    Raises:
        OptionError: The source does not exist, or is not valid.
        ReadError: The store does not answer within the timeout.
    """
    base, *patterns = glob_parts(src)
    try:
        described(base, timeout_seconds)
    except (UnsupportedURIError, OSError, ValueError) as error:
        what = (
            "does not exist" if isinstance(error, FileNotFoundError) else f"is not valid: {error}"
        )
        raise OptionError(f"{src} {what}") from error
    if patterns and not any(True for _ in _roots(src, timeout_seconds)):
        raise OptionError(f"{src} matches nothing")


def described(path: str, timeout_seconds: float = DEFAULTS["read_timeout_seconds"]) -> Entry:
    """Describes a path or URI, and retries like ``list_files``."""
    location = Location.of(path)
    return retried(location, lambda: store_of(location).entry(location), timeout_seconds)


def list_files(
    src: str,
    *,
    recursive: bool = False,
    pattern: str | None = None,
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
) -> Iterator[Listed]:
    """Yields the files of a source, folder by folder, and skipped entries with the reason.

    Args:
        src: A folder, a file or a glob: a path or a URI. A glob may contain ``*``, ``?``, ``[...]``
            and ``{a,b}``; matching folders are listed.
        recursive: Whether to include subfolders and linked folders.
        pattern: A glob for file names. Files with other names are omitted, and not reported.
        timeout_seconds: The timeout for each folder of a store that does not answer.

    Raises:
        OptionError: The source does not exist.
        ReadError: A folder cannot be listed.
    """
    is_wanted = matcher(pattern) if pattern else lambda name: True
    for root in _roots(src, timeout_seconds):
        if root.kind == "folder":
            yield from _files_in(root.path, recursive, is_wanted, timeout_seconds)
        else:
            yield from _file(root, is_wanted)


def _files_in(
    folder: str, recursive: bool, is_wanted: Callable[[str], bool], timeout_seconds: float
) -> Iterator[Listed]:
    waiting: list[tuple[str, tuple[str, ...]]] = [(folder, ())]
    while waiting:
        path, above = waiting.pop()
        real = str(Location.parse(path).resolved())
        if real in above:
            continue  # a circular link
        try:
            for entry in _entries(path, timeout_seconds):
                if entry.kind != "folder":
                    yield from _file(entry, is_wanted)
                elif _is_hidden(entry.name):
                    yield Listed(_printable(entry.path), skipped="hidden")
                elif not recursive:
                    yield Listed(_printable(entry.path), skipped="subfolder")
                else:
                    waiting.append((entry.path, (*above, real)))
        except _UnlistableError:
            if path == folder:
                raise
            yield Listed(_printable(path), skipped="unreadable subfolder")


class _UnlistableError(ReadError):
    """A folder cannot be listed, for a reason of its own rather than the whole store's."""


def _entries(path: str, timeout_seconds: float) -> Iterator[Entry]:
    folder = Location.of(path)
    # Local folders are streamed. The answer of a store may be a whole folder.
    try:
        if folder.is_local:
            yield from store_of(folder).entries(folder)
        else:
            store = store_of(folder)
            yield from retried(folder, lambda: list(store.entries(folder)), timeout_seconds)
    except OSError as error:
        raise _UnlistableError(f"{path} cannot be listed: {error}") from error
    except ReadError as error:
        if isinstance(error.__cause__, PermissionError):
            raise _UnlistableError(str(error)) from error
        raise


def _file(entry: Entry, is_wanted: Callable[[str], bool]) -> Iterator[Listed]:
    path = _printable(entry.path)
    if not is_wanted(entry.name):
        return
    if _is_hidden(entry.name):
        yield Listed(path, skipped="hidden")
    elif path != entry.path:
        yield Listed(path, skipped="name is not UTF-8")
    elif entry.kind == "dangling":
        yield Listed(path, skipped="dangling link")
    elif entry.kind == "other":
        yield Listed(path, skipped="not a file")
    else:
        yield Listed(path, entry.length, entry.modified)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))  # Spark's rule, and Arrow's


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def glob_parts(src: str) -> list[str]:
    """Splits a source into the part before its first glob, and the names after it."""
    place = Location.parse(src)
    if place.is_web:  # here, a question mark begins a query
        return [src]
    if place.is_local and os.path.exists(Location.of(src).path):
        return [src]  # names may contain glob characters
    names = place.path.split("/")
    for number, name in enumerate(names):
        if _GLOB.search(name):
            head = "/".join(names[:number]) or ("/" if names[0] == "" else ".")
            head = "" if head == "/" and not place.is_local else head
            return [str(place.sibling(head)), *filter(None, names[number:])]
    return [src]


def _roots(src: str, timeout_seconds: float) -> Iterator[Entry]:
    """Yields the files and folders that a source names."""
    base, *patterns = glob_parts(src)
    try:
        found = [described(base, timeout_seconds)]
    except FileNotFoundError as error:
        raise OptionError(f"{src} does not exist") from error
    for pattern in patterns:
        matches = matcher(pattern)
        inside = itertools.chain.from_iterable(
            _entries(folder.path, timeout_seconds) for folder in found if folder.kind == "folder"
        )
        found = sorted(
            entry
            for entry in inside
            if matches(entry.name) and (not _is_hidden(entry.name) or _is_hidden(pattern))
        )
    yield from found


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns a matcher of names for a Hadoop glob: ``*``, ``?``, ``[...]``, ``{a,b}``."""
    try:
        expression = re.compile(_expression(pattern), re.DOTALL)
    except re.error as error:
        raise OptionError(f"the pattern {pattern!r} is not valid: {error}") from error
    return lambda name: expression.fullmatch(name) is not None


def _expression(pattern: str) -> str:
    parts: list[str] = []
    depth = 0
    letters = iter(re.findall(r"\\.|\[[!^]?\]?[^\]]*\]|.", pattern, re.DOTALL))
    for letter in letters:
        if letter in ("*", "?"):
            parts.append(".*" if letter == "*" else ".")
        elif letter == "{":
            depth += 1
            parts.append("(?:")
        elif letter == "}" and depth:
            depth -= 1
            parts.append(")")
        elif letter == "," and depth:
            parts.append("|")
        elif len(letter) > 2 and letter.startswith("["):
            negated, members = letter[1] in "!^", letter[1:-1].lstrip("!^")
            quoted = re.sub(r"[\\\[\]&~|]|(?<=-)-", r"\\\g<0>", members)
            parts.append(f"[{'^' if negated else ''}{quoted}]")
        else:
            parts.append(re.escape(letter.removeprefix("\\") or letter))
    if depth:
        raise OptionError(f"the pattern {pattern!r} is not valid: a brace is not closed")
    return "".join(parts)


def escaped(path: str) -> str:
    """Escapes a path that Hadoop would otherwise read as a glob."""
    return "".join(f"\\{letter}" if letter in "{}[]*?\\" else letter for letter in path)
