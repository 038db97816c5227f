"""Runs functions in processes that have too little memory, as a worker on a small machine has."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

MEGABYTE = 1 << 20


def outcomes(function: Callable[[], str], megabytes: Iterable[int]) -> list[str]:
    """Calls a function once per limit. Returns its results, or what it raised, or ``"died"``.

    Args:
        function: It is called in a fork of this process, which must have no threads.
        megabytes: How much memory may be allocated, in addition to what this process has.
    """
    return [_outcome(function, limit * MEGABYTE) for limit in megabytes]


def _outcome(function: Callable[[], str], limit: int) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
        try:
            result = function()
        except BaseException as error:
            result = type(error).__name__
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        result = file.read()
    os.waitpid(child, 0)
    return result or "died"
