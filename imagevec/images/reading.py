"""Paths and URIs to bytes, ahead of their turn.

A file that does not exist is a bad image. A file that cannot be read for any other reason is not:
the read is tried again, and in the end it fails the task. So a null always means that another try
would give a null, too.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from imagevec.errors import ImageError, ReadError
from imagevec.images.parallel import map_ahead
from imagevec.images.stores import (
    UnsupportedURIError,
    existing_path,
    local_path,
    scheme_of,
    store_of,
)
from imagevec.images.values import Value
from imagevec.options import DEFAULTS

_READ_THREADS = 8
_MAX_READ_AHEAD = 16  # files that are held in memory before their turn

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0

_OF_THE_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}

T = TypeVar("T")


def read_ahead(
    values: Iterable[Value],
    allowed_roots: Sequence[str] = (),
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
) -> Iterator[Value]:
    """The values in order, with paths replaced by what is read there, or by why it cannot be.

    A few files are read at a time, in threads, so that slow storage overlaps decoding and the
    forward pass. The other arguments, and what is raised, are those of ``read``.
    """
    read_value = functools.partial(
        _read_or_error, allowed_roots=allowed_roots, timeout_seconds=timeout_seconds
    )
    return map_ahead(read_value, values, _READ_THREADS, _MAX_READ_AHEAD, is_slow=_is_path)


def _is_path(value: Value) -> bool:
    return isinstance(value.data, str)


def _read_or_error(value: Value, allowed_roots: Sequence[str], timeout_seconds: float) -> Value:
    if not isinstance(value.data, str):
        return value
    try:
        return value._replace(data=read(value.data, allowed_roots, timeout_seconds))
    except ImageError as error:
        return value._replace(data=error)


def read(
    path: str,
    allowed_roots: Sequence[str] = (),
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
) -> bytes:
    """The bytes of a file: a local path, or a URI of a scheme that ``stores`` knows.

    Args:
        path: Relative local paths are of the worker's folder.
        allowed_roots: Folders, or prefixes of URIs (``"s3://bucket/photos"``, ``"s3://"``), outside
            of which nothing is read; any file may be, if there are none. Symbolic links and ``..``
            are followed before the question is asked.
        timeout_seconds: After which a read that fails is not tried again. Between two tries there
            are pauses, each about twice as long as the one before.

    Raises:
        ImageError: ``unreadable_path``, which another try would not change, or ``forbidden_path``.
        ReadError: It failed for any other reason.
    """
    if allowed_roots and not _is_allowed(path, allowed_roots):
        raise ImageError("forbidden_path", f"{path} is under none of allowed_roots")
    try:
        return retried(path, lambda: store_of(path).read(path), timeout_seconds)
    except (UnsupportedURIError, OSError, ValueError) as error:
        raise ImageError("unreadable_path", f"{path}: {error}") from error


def retried(path: str, action: Callable[[], T], timeout_seconds: float) -> T:
    """What an action on a path returns, tried again until it does.

    Raises:
        ReadError: It fails until the time is up, or there is no permission.
        UnsupportedURIError, OSError, ValueError: By what the path itself is, it cannot succeed.
    """
    deadline = time.monotonic() + timeout_seconds
    answer: Exception | None = None  # the last one, which says more than that the time is up
    for tries in itertools.count(1):
        try:
            if scheme_of(path) == "file":
                return action()
            return _within(deadline - time.monotonic(), action)
        except Exception as error:  # of whatever type the store's library has
            if _is_of_the_path(error):
                raise
            if answer is None or not isinstance(error, _NoAnswerError):
                answer = error
            again = min(_FIRST_PAUSE_SECONDS * 2 ** (tries - 1), _LONGEST_PAUSE_SECONDS)
            pause = again * random.uniform(0.5, 1.5)  # not all workers at the same time
            if isinstance(error, PermissionError | ImportError) or (
                time.monotonic() + pause >= deadline
            ):
                said = str(answer) or type(answer).__name__
                raise ReadError(f"{path} cannot be read: {said} (tries: {tries})") from answer
        time.sleep(pause)
    raise AssertionError("it is tried until it succeeds or fails")


def _is_of_the_path(error: Exception) -> bool:
    """Whether another try, elsewhere or later, would fail as well."""
    if isinstance(error, OSError) and error.errno in _OF_THE_PATH:
        return True
    if isinstance(error, ValueError):  # a null byte, a lone surrogate, a URI that is malformed
        # So is an answer that was cut off, or a certificate that has expired.
        return not isinstance(error, json.JSONDecodeError | UnicodeDecodeError | OSError)
    not_there = FileNotFoundError | IsADirectoryError | NotADirectoryError
    return isinstance(error, not_there | UnsupportedURIError)


class _NoAnswerError(TimeoutError):
    """An action took longer than it may."""


def _within(seconds: float, action: Callable[[], T]) -> T:
    """What an action returns; it is left alone, in a thread, where that takes too long."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(action())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if failed:
        raise failed[0]
    if not done:
        raise _NoAnswerError(f"no answer after {seconds:.0f} seconds")
    return done[0]


def _is_allowed(path: str, allowed_roots: Sequence[str]) -> bool:
    scheme = scheme_of(path)
    if scheme != "file":
        place, _, query = _quoted(path).partition("?")
        settings = "" if scheme in ("http", "https") else query  # an endpoint, say
        roots = [_quoted(root).partition("?") for root in allowed_roots]
        same = [root for root, _, theirs in roots if theirs == settings or root.endswith("://")]
        return _is_under(place, same) and ".." not in urllib.parse.unquote(place).split("/")
    try:
        real = os.path.realpath(existing_path(path))
    except ValueError:
        return False
    local_roots = [
        os.path.realpath(local_path(root)) if root.startswith(("file:", "/")) else root
        for root in allowed_roots
    ]
    return _is_under(real, local_roots)


def _quoted(uri: str) -> str:
    return urllib.parse.quote(uri, safe="/:%@?=&+,;~")


def _is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
