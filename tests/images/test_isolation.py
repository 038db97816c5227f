"""Decoding in a child process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from imagevec.errors import ImageError
from imagevec.images.isolation import isolated
from imagevec.images.prepare import Row
from imagevec.images.values import Value


def prepare(value: Value) -> Row:
    """A decoder that some bytes kill, and others hang."""
    if value is None:
        return Row()
    if value == b"kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if value == b"hang":
        time.sleep(600)
    if value == b"bad":
        raise ImageError("corrupt", "as it says")
    return Row(torch.full((3, 2, 2), len(value), dtype=torch.uint8), width=os.getpid())


@pytest.fixture(scope="module")
def prepare_isolated() -> Callable[[Value], Row]:
    return isolated(prepare, on_error="null", timeout_seconds=1)


def test_a_crash_and_a_hang_cost_one_row_each(prepare_isolated: Callable[[Value], Row]) -> None:
    rows = [prepare_isolated(value) for value in (b"a", b"kill", b"bb", b"hang", b"ccc", None)]
    assert [row.error and row.error.code for row in rows] == [
        None,
        "crashed",
        None,
        "timed_out",
        None,
        None,
    ]
    values = [None if row.image is None else int(row.image[0, 0, 0]) for row in rows]
    assert values == [1, None, 2, None, 3, None]
    assert os.getpid() not in {row.width for row in rows}


def test_an_image_error_comes_back_as_it_is(prepare_isolated: Callable[[Value], Row]) -> None:
    with pytest.raises(ImageError) as raised:
        prepare_isolated(b"bad")
    assert (raised.value.code, raised.value.detail) == ("corrupt", "as it says")


def test_a_crash_is_raised_where_errors_are() -> None:
    with pytest.raises(ImageError, match="crashed"):
        isolated(prepare, on_error="raise", timeout_seconds=1)(b"kill")
