"""Ordered ``map`` functions in threads, with a bounded number of pending results."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    ahead: int,
    is_slow: Callable[[T], bool] = lambda item: True,
) -> Iterator[R]:
    """Computes up to ``ahead`` results before they are requested, while earlier ones are in use.

    An item that is not slow is processed in the calling thread if no earlier item is pending.
    """
    pool = ThreadPoolExecutor(threads)  # starts no threads if nothing is slow
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            if not pending and not is_slow(item):
                yield function(item)
                continue
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        _end(pool)


def map_in_turns(
    function: Callable[[T], R], items: Iterable[T], threads: int, turn: int
) -> Iterator[R]:
    """Computes ``turn`` results at a time, and pauses while they are in use."""
    iterator = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        while chunk := list(itertools.islice(iterator, turn)):
            yield from list(pool.map(function, chunk))
    finally:
        _end(pool)


def _end(pool: ThreadPoolExecutor) -> None:
    """Ends the threads without waiting for them.

    An abandoned generator is finalized wherever the garbage collector runs, such as in a thread
    that starts and holds a lock, for which the end of another thread would wait forever.
    """
    pool.shutdown(wait=False, cancel_futures=True)
