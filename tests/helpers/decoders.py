"""Decoders that die, hang or wait. Child processes import them by name, with few dependencies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from imagevec.errors import ImageError
from imagevec.images.isolation import _exit_with_parent
from imagevec.images.prepare import Row
from imagevec.images.values import Value


def fragile(value: Value) -> Row:
    """Decodes a value; certain bytes kill the process, and others make it hang."""
    if value.data is None:
        return Row()
    if value.data == b"kill":
        _die()
    if value.data == b"no memory for the process":  # as the kernel does
        os.kill(os.getpid(), signal.SIGKILL)
    if value.data == b"no memory":
        raise MemoryError("from the decoder")
    if value.data == b"hang":
        time.sleep(600)
    if value.data == b"bad":
        raise ImageError("corrupt", "as it says")
    assert isinstance(value.data, bytes)
    return Row(np.full((2, 2, 3), len(value.data), np.uint8), width=os.getpid())


def fragile_of_stream(value: Value, preprocessing: object, options: object) -> Row:
    """Runs ``fragile`` in place of ``prepare``."""
    return fragile(value)


def dies_at_first(value: Value, log: Path, deaths: int) -> Row:
    """Decodes a value, but the process dies the first ``deaths`` times, for any value."""
    _log_and_die(log, deaths)
    return fragile(value)


def start_that_dies(log: Path, deaths: int) -> None:
    """Initializes a process, which dies the first ``deaths`` times."""
    _exit_with_parent()
    _log_and_die(log, deaths)


def start_that_hangs() -> None:
    _exit_with_parent()
    time.sleep(600)


def logged(log: Path) -> list[int]:
    """Returns the ids of the processes that have run, in order."""
    return [int(line) for line in log.read_text().splitlines()]


def meeting(value: Value, preprocessing: object, options: object) -> Row:
    """Replaces ``prepare``: ``<folder>|<number>`` becomes an image of that level.

    Numbers 0 and 1 wait until two processes are running. The width is the process id.
    """
    assert isinstance(value.data, bytes)
    folder, _, number = value.data.decode().partition("|")
    (Path(folder) / str(os.getpid())).touch()
    deadline = time.monotonic() + 100
    while int(number) < 2 and len(os.listdir(folder)) < 2:
        if time.monotonic() > deadline:
            raise RuntimeError("only one process is running")
        time.sleep(0.01)
    return Row(np.full((2, 2, 3), int(number), np.uint8), width=os.getpid())


def modules(value: Value) -> Any:
    """Returns the process id and the names of the imported modules."""
    return os.getpid(), set(sys.modules)


def process(value: Value) -> Any:
    return os.getpid()


def _log_and_die(log: Path, deaths: int) -> None:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if len(logged(log)) <= deaths:
        _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
