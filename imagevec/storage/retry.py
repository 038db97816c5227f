"""Retries actions on a store, with increasing pauses, within a time limit."""

from __future__ import annotations

import errno
import io
import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from imagevec.errors import ReadError, WriteError
from imagevec.storage.location import ForbiddenError, Location, UnsupportedURIError
from imagevec.storage.stores import SettingsError

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0

_OF_THE_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

T = TypeVar("T")


def retried(
    location: Location,
    action: Callable[[], T],
    timeout_seconds: float,
    *,
    writes: bool = False,
    any_size: bool = False,
) -> T:
    """Calls an action on a location until it succeeds, and returns its result.

    Args:
        writes: Whether the action writes, and raises ``WriteError`` rather than ``ReadError``.
        any_size: Whether the action transfers a file of any size. The timeout then begins with the
            first failure, and the store's client ends requests without an answer.

    Raises:
        ReadError, WriteError: The action failed until the timeout, or only a person can help:
            permission is denied, the disk is full, or the store's settings are wrong.
        ForbiddenError, UnsupportedURIError, OSError, ValueError: The action cannot succeed for this
            location.
    """
    deadline = time.monotonic() + timeout_seconds
    answer: Exception | None = None  # the last error that is more specific than a timeout
    for tries in itertools.count(1):
        try:
            if location.is_local or any_size:
                return action()
            return _within(deadline - time.monotonic(), action)
        except MemoryError:  # of this worker
            raise
        except Exception as error:  # each store's library has its own exceptions
            if _is_final(error):
                raise
            if any_size and tries == 1:
                deadline = time.monotonic() + timeout_seconds
            if answer is None or not isinstance(error, _NoAnswerError):
                answer = error
            again = min(_FIRST_PAUSE_SECONDS * 2 ** (tries - 1), _LONGEST_PAUSE_SECONDS)
            pause = again * random.uniform(0.5, 1.5)  # so that workers do not retry in step
            if _needs_a_person(error) or time.monotonic() + pause >= deadline:
                said = str(answer) or type(answer).__name__
                kind, verb = (WriteError, "written") if writes else (ReadError, "read")
                raise kind(f"{location} cannot be {verb}: {said} (tries: {tries})") from answer
        time.sleep(pause)
    raise AssertionError("unreachable: the loop ends by returning or raising")


def _is_final(error: Exception) -> bool:
    """Returns whether a retry, on any machine and at any time, would also fail."""
    if isinstance(error, OSError) and error.errno in _OF_THE_PATH:
        return True
    if isinstance(error, ValueError):  # a null byte, a lone surrogate, a malformed URI
        # Truncated responses and expired certificates also raise ValueErrors.
        return not isinstance(error, json.JSONDecodeError | UnicodeDecodeError | OSError)
    not_there = FileNotFoundError | IsADirectoryError | NotADirectoryError
    unsupported = UnsupportedURIError | io.UnsupportedOperation
    return isinstance(error, not_there | unsupported | ForbiddenError)


def _needs_a_person(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return True
    return isinstance(error, PermissionError | ImportError | SettingsError)


class _NoAnswerError(TimeoutError):
    """An action exceeded its time limit."""


def _within(seconds: float, action: Callable[[], T]) -> T:
    """Runs an action in a thread and returns its result. The thread is abandoned on a timeout."""
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
