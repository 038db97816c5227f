"""Decoding in child processes, so that what kills or hangs a decoder costs one row.

Spark retries a task whose worker died, and an image that kills the worker each time would fail the
job in the end. A child costs some 100 MB, a second at its start, and the copying of each image to
it and of its crop back. It imports Pillow and NumPy, and neither PyTorch nor OpenVINO.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from imagevec.errors import ImageError, ImageVecError
from imagevec.images.prepare import Row
from imagevec.images.values import Value

Prepare = Callable[[Value], Row]

TIMEOUT_SECONDS = 60.0
_START_SECONDS = 120.0
_STARTS = 3  # of a child, before it counts as one that cannot start


def isolated(prepare: Prepare, timeout_seconds: float = TIMEOUT_SECONDS) -> Prepare:
    """``prepare``, called in a child process of this one; each calling thread has one to itself.

    An image whose child dies is tried once more in a fresh one before it is blamed: the child may
    have been killed for another reason, for its memory say.

    Args:
        prepare: A picklable function.
        timeout_seconds: The child is killed when one value takes longer.

    Raises:
        ImageVecError: A child dies at its start, again and again.
    """

    def prepare_isolated(value: Value) -> Row:
        for fresh in (False, True):
            child = _started() if fresh else _waiting() or _started()
            try:
                row = child.submit(prepare, value).result(timeout_seconds)
            except BrokenProcessPool:
                _end(child)
                continue
            except FutureTimeoutError:
                _end(child)
                detail = f"not decoded after {timeout_seconds:g} seconds"
                return Row(error=ImageError("timed_out", detail))
            except Exception:  # of prepare's own
                _waiting_children.put(child)
                raise
            _waiting_children.put(child)
            return row
        return Row(error=ImageError("crashed", "its decoder killed the process"))

    return prepare_isolated


# They outlive the task, as this process does. The last used comes first.
_waiting_children: queue.LifoQueue[ProcessPoolExecutor] = queue.LifoQueue()


def _waiting() -> ProcessPoolExecutor | None:
    """A child that is still alive."""
    while True:
        try:
            child = _waiting_children.get_nowait()
        except queue.Empty:
            return None
        if all(process.is_alive() for process in (child._processes or {}).values()):
            return child
        _end(child)


def _started() -> ProcessPoolExecutor:
    """A child whose imports are done, so that their time is no value's."""
    # Not forked: a copy of other threads' locks, in whatever state, would hang.
    context = multiprocessing.get_context("spawn")
    for _ in range(_STARTS):
        child = ProcessPoolExecutor(1, mp_context=context, initializer=_exit_with_parent)
        try:
            child.submit(_nothing).result(_START_SECONDS)
        except (BrokenProcessPool, FutureTimeoutError):
            _end(child)
        else:
            return child
    raise ImageVecError(
        f"a process that decodes images did not start, {_STARTS} times in a row: "
        "the worker may have too little memory; isolate=False does without"
    )


def _end(child: ProcessPoolExecutor) -> None:
    for process in list((child._processes or {}).values()):
        process.kill()
    child.shutdown(cancel_futures=True)


def _nothing() -> None:
    """Takes as long as the child's start."""


def _exit_with_parent() -> None:
    """A parent that is killed takes its child along."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
