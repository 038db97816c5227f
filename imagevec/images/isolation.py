"""Decodes in child processes, so that an image that crashes or hangs a decoder costs one row.

Spark retries a task after its worker dies, so an image that kills the worker every time fails the
job. A child process costs about 100 MB, a second at startup, and copying each image to the child
and its crop back. It imports Pillow and NumPy, but not PyTorch or OpenVINO.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
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
_STARTS = 3  # attempts to start a child before giving up


def isolated(prepare: Prepare, timeout_seconds: float = TIMEOUT_SECONDS) -> Prepare:
    """Wraps ``prepare`` to run in a child process. Each calling thread uses its own child.

    If a child dies, the image is retried once in a new child, because the first may have died for
    another reason. If the system kills both, it lacks memory, which says nothing about the image.

    Args:
        prepare: A picklable function.
        timeout_seconds: The time limit per value, after which the child is killed.

    Raises:
        ImageVecError: A child repeatedly fails to start, or is killed by the system.
    """

    def prepare_isolated(value: Value) -> Row:
        for fresh in (False, True):
            child = _started() if fresh else _waiting() or _started()
            (process,) = child._processes.values()
            try:
                row = child.submit(prepare, value).result(timeout_seconds)
            except BrokenProcessPool:
                process.join()
                _end(child)
                continue
            except FutureTimeoutError:
                _end(child)
                detail = f"not decoded after {timeout_seconds:g} seconds"
                return Row(error=ImageError("timed_out", detail))
            except Exception:  # raised by prepare
                _waiting_children.put(child)
                raise
            _waiting_children.put(child)
            return row
        if process.exitcode == -signal.SIGKILL:  # decoders die by other signals
            raise ImageVecError(
                "a decoding process was killed twice by the system, which probably lacks memory: "
                "give the worker more, or lower max_pixels"
            )
        return Row(error=ImageError("crashed", "the decoder killed its process"))

    return prepare_isolated


# Children outlive the task, like this process. The most recently used child is reused first.
_waiting_children: queue.LifoQueue[ProcessPoolExecutor] = queue.LifoQueue()


def _waiting() -> ProcessPoolExecutor | None:
    """Returns an idle child that is still alive, or ``None``."""
    while True:
        try:
            child = _waiting_children.get_nowait()
        except queue.Empty:
            return None
        if all(process.is_alive() for process in (child._processes or {}).values()):
            return child
        _end(child)


def _started() -> ProcessPoolExecutor:
    """Starts a child and waits for its imports, so that they do not count as decoding time."""
    # Not forked: a child could hang on a lock that another thread held at the fork.
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
        f"a decoding process failed to start {_STARTS} times in a row: "
        "the worker may have too little memory; isolate=False needs no such process"
    )


def _end(child: ProcessPoolExecutor) -> None:
    for process in list((child._processes or {}).values()):
        process.kill()
    child.shutdown(cancel_futures=True)


def _nothing() -> None:
    """Returns once the child has started."""


def _exit_with_parent() -> None:
    """Ends this child when its parent ends, even if the parent is killed."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
