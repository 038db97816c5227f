"""``map`` in threads, in order, with a bounded number of results that wait."""

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
    """Works on up to ``ahead`` items beyond the one that is taken, also while it is in use.

    An item that is not slow is not worth a thread: where none waits before it, it is done here.
    """
    pool = ThreadPoolExecutor(threads)  # starts no thread where nothing is slow
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
        pool.shutdown(cancel_futures=True)


def map_in_turns(
    function: Callable[[T], R], items: Iterable[T], threads: int, turn: int
) -> Iterator[R]:
    """Works on ``turn`` items at a time, and rests while they are in use."""
    iterator = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(itertools.islice(iterator, turn)):
            yield from list(pool.map(function, chunk))
