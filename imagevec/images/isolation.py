"""Decoding in a child process, so that what kills or hangs a decoder costs one row.

Spark retries a task whose worker died, and an image that kills the worker each time would fail the
job in the end. A child process costs some 300 MB a worker, seconds at its start, and the copying of
each image to it and of its crop back.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

import numpy as np
import numpy.typing as npt
import torch

from imagevec.errors import ImageError
from imagevec.images.prepare import Row
from imagevec.images.values import Value

_START_SECONDS = 120.0


def isolated(
    prepare_one: Callable[[Value], Row], on_error: str, timeout_seconds: float = 60.0
) -> Callable[[Value], Row]:
    """``prepare_one``, called in a child process of this one, one value at a time.

    Args:
        prepare_one: A picklable function that gives an empty row for a null.
        on_error: The option.
        timeout_seconds: The child is killed when one value takes longer.
    """

    def prepare_isolated(value: Value) -> Row:
        try:
            result = _child().submit(_with_numpy, prepare_one, value).result(timeout_seconds)
        except BrokenProcessPool:
            error = ImageError("crashed", "its decoder killed the process")
        except FutureTimeoutError:
            error = ImageError("timed_out", f"not decoded after {timeout_seconds:g} seconds")
        else:
            row, image = result
            return row if image is None else row._replace(image=torch.from_numpy(image))
        _end_child()
        _warm_up(prepare_one)
        if on_error == "raise":
            raise error
        return Row(error=error)

    _warm_up(prepare_one)
    return prepare_isolated


@functools.cache
def _child() -> ProcessPoolExecutor:
    """The one child of this process; it outlives the task, as this process does."""
    # Not forked: a copy of other threads' locks, in whatever state, would hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_child)


def _warm_up(prepare_one: Callable[[Value], Row]) -> None:
    """Takes the time of the child's imports before the time of a value counts."""
    _child().submit(_with_numpy, prepare_one, None).result(_START_SECONDS)


def _end_child() -> None:
    pool = _child()
    _child.cache_clear()
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(cancel_futures=True)


def _prepare_child() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that is killed takes its child along."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _with_numpy(
    prepare_one: Callable[[Value], Row], value: Value
) -> tuple[Row, npt.NDArray[np.uint8] | None]:
    """The row with its image apart: PyTorch would pass a tensor by a file that dies with us."""
    row = prepare_one(value)
    image = None if row.image is None else np.ascontiguousarray(row.image.numpy())
    return row._replace(image=None), image
