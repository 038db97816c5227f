from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from imagevec.images.parallel import map_ahead, map_in_turns

MAPS = [
    functools.partial(map_ahead, threads=3, ahead=4),
    functools.partial(map_in_turns, threads=3, turn=4),
]


@pytest.fixture(params=MAPS, ids=["ahead", "in turns"])
def threaded_map(request):
    return request.param


def slow_for_even(number: int) -> int:
    time.sleep(0.002 * (number % 2 == 0))
    return -number


@pytest.mark.parametrize("count", [0, 1, 4, 5, 50])
def test_results_are_in_order(threaded_map, count):
    assert list(threaded_map(slow_for_even, range(count))) == [-number for number in range(count)]


def test_few_items_are_taken_before_they_are_needed(threaded_map):
    taken = []

    def numbers():
        for number in range(1000):
            taken.append(number)
            yield number

    results = threaded_map(lambda number: number, numbers())
    next(results)
    assert len(taken) <= 6
    results.close()


def test_several_threads_work(threaded_map):
    together = threading.Barrier(3, timeout=20)
    assert list(threaded_map(lambda _: together.wait() >= 0, range(3))) == [True] * 3


def test_an_error_comes_at_its_place(threaded_map):
    results = threaded_map(lambda number: 1 // (number - 1), range(3))
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_no_thread_is_left_behind(threaded_map):
    before = threading.active_count()
    results = threaded_map(slow_for_even, range(1000))
    next(results)
    results.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def is_even(number: int) -> bool:
    return number % 2 == 0


def with_thread(number: int) -> tuple[int, int]:
    return number, threading.get_ident()


def test_what_is_not_slow_is_done_in_the_calling_thread():
    results = map_ahead(with_thread, range(100), 3, 4, is_slow=lambda number: False)
    assert list(results) == [(number, threading.get_ident()) for number in range(100)]


def test_what_is_not_slow_is_done_when_it_is_taken():
    done: list[int] = []
    results: Any = map_ahead(done.append, range(100), 3, 4, is_slow=lambda number: False)
    next(results)
    assert done == [0]
    results.close()


def test_what_is_not_slow_waits_for_what_is_slow_before_it():
    begin = threading.Event()

    def wait_if_slow(number: int) -> tuple[int, int]:
        assert not is_slow(number) or begin.wait(20)
        return with_thread(number)

    def is_slow(number: int) -> bool:
        return number == 2

    def numbers() -> Iterator[int]:
        yield from range(7)
        begin.set()  # the numbers of 2 on have been taken while 2 was at work
        yield from range(7, 20)

    here = threading.get_ident()
    results = list(map_ahead(wait_if_slow, numbers(), 3, 5, is_slow))
    assert [number for number, _ in results] == list(range(20))
    assert [thread == here for _, thread in results[:7]] == [True] * 2 + [False] * 5


def test_a_mix_is_in_order():
    results = map_ahead(slow_for_even, range(50), 3, 4, is_slow=is_even)
    assert list(results) == [-number for number in range(50)]


def test_an_error_of_what_is_not_slow_comes_at_its_place():
    results = map_ahead(lambda number: 1 // (number - 2), range(4), 3, 4, is_slow=lambda _: False)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_abandoned_map_does_not_wait_for_its_threads() -> None:
    """Its finalizer may run where waiting is a deadlock: in a thread that is about to start."""
    release = threading.Event()
    results: Any = map_ahead(lambda item: item == 0 or release.wait(60), range(4), 2, 3)
    assert next(results)
    closing = threading.Thread(target=results.close, daemon=True)
    closing.start()
    closing.join(20)
    is_waiting = closing.is_alive()
    release.set()
    assert not is_waiting
