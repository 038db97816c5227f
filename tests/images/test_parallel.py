from __future__ import annotations

import functools
import threading
import time

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
    results = threaded_map(lambda number: number, (taken.append(n) or n for n in range(1000)))
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
    assert threading.active_count() == before
