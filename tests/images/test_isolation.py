"""Decoding in a child process."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagevec import ImageError, ImageVecError, Preprocessing
from imagevec.images import isolation
from imagevec.images.isolation import isolated
from imagevec.images.prepare import Row, prepare
from imagevec.images.values import Value
from tests.helpers import decoders
from tests.helpers.decoders import fragile
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import execution_options, mean_engine, rows, series, stream
from tests.helpers.structs import file_batch

PREPARE = functools.partial(
    prepare, preprocessing=Preprocessing(), options=execution_options(formats=["JPEG", "PNG"])
)


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has isolated nothing yet."""
    children: queue.LifoQueue = queue.LifoQueue()
    monkeypatch.setattr(isolation, "_waiting_children", children)
    yield
    while not children.empty():
        isolation._end(children.get())


def code(row: Row) -> str | None:
    return None if row.error is None else row.error.code


def test_a_crash_and_a_hang_cost_one_row_each() -> None:
    patient, impatient = isolated(fragile), isolated(fragile, timeout_seconds=1)
    values = [Value(data) for data in (b"a", b"kill", b"bb", b"hang", b"ccc", None)]
    rows = [(impatient if value.data == b"hang" else patient)(value) for value in values]
    assert [code(row) for row in rows] == [None, "crashed", None, "timed_out", None, None]
    levels = [None if row.input is None else int(row.input[0, 0, 0]) for row in rows]
    assert levels == [1, None, 2, None, 3, None]
    assert os.getpid() not in {row.width for row in rows}


def test_an_image_error_comes_back_as_it_is() -> None:
    with pytest.raises(ImageError) as raised:
        isolated(fragile)(Value(b"bad"))
    assert (raised.value.code, raised.value.detail) == ("corrupt", "as it says")


def test_lack_of_memory_in_a_child_fails_the_task() -> None:
    with pytest.raises(MemoryError, match="from the decoder"):
        isolated(fragile)(Value(b"no memory"))
    with pytest.raises(ImageVecError, match="killed twice by the system") as raised:
        isolated(fragile)(Value(b"no memory for the process"))
    assert not isinstance(raised.value, ImageError)
    assert isolated(fragile)(Value(b"abc")).error is None


def test_an_error_does_not_end_the_child() -> None:
    (before,) = {isolated(decoders.process)(Value(None)) for _ in range(3)}
    with pytest.raises(ImageError):
        isolated(fragile)(Value(b"bad"))
    assert isolated(decoders.process)(Value(None)) == before


def test_rows_are_as_without_isolation() -> None:
    ours: Any
    theirs: Any
    for data in (encode(photo()), encode(photo(seed=1), "JPEG"), b"", b"garbage", None):
        ours, theirs = isolated(PREPARE)(Value(data)), PREPARE(Value(data))
        assert np.array_equal(ours.input, theirs.input)
        assert (ours.width, ours.height, str(ours.error)) == (
            theirs.width,
            theirs.height,
            str(theirs.error),
        )


def test_an_image_whose_child_dies_once_is_tried_again_in_a_fresh_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    row = isolated(functools.partial(decoders.dies_at_first, log=log, deaths=1))(Value(b"abc"))
    assert row.error is None
    assert row.input is not None and (row.input == 3).all()
    first, second = decoders.logged(log)
    assert first != second == row.width


def test_an_image_that_kills_each_child_is_blamed_after_two(tmp_path: Path) -> None:
    log = tmp_path / "log"
    row = isolated(functools.partial(decoders.dies_at_first, log=log, deaths=99))(Value(b"abc"))
    assert row.input is None
    assert code(row) == "crashed"
    assert len(set(decoders.logged(log))) == len(decoders.logged(log)) == 2
    after = isolated(fragile)(Value(b"abc"))
    assert after.error is None
    assert after.width not in decoders.logged(log)


def test_a_child_that_was_killed_while_it_waited_costs_nothing() -> None:
    killed = isolated(fragile)(Value(b"a")).width
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    row = isolated(fragile)(Value(b"bb"))
    assert row.input is not None and (row.input == 2).all()
    assert row.width != killed


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_child_that_dies_at_its_start_is_started_again(
    deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    start = functools.partial(decoders.start_that_dies, log, deaths)
    monkeypatch.setattr(isolation, "_exit_with_parent", start)
    row = isolated(fragile)(Value(b"abc"))
    assert row.input is not None and (row.input == 3).all()
    assert len(decoders.logged(log)) == deaths + 1
    assert decoders.logged(log)[-1] == row.width


def dies_at_start(tmp_path: Path) -> Callable[[], None]:
    return functools.partial(decoders.start_that_dies, tmp_path / "log", 99)


def hangs_at_start(tmp_path: Path) -> Callable[[], None]:
    return decoders.start_that_hangs


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(("start", "seconds"), [(dies_at_start, 120), (hangs_at_start, 0.1)])
def test_a_child_that_never_starts_is_an_error_that_says_so(
    start: Callable[[Path], Callable[[], None]],
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(isolation, "_exit_with_parent", start(tmp_path))
    monkeypatch.setattr(isolation, "_START_SECONDS", seconds)
    with pytest.raises(ImageVecError, match="failed to start 3 times in a row") as raised:
        isolated(fragile)(Value(b"a"))
    assert not isinstance(raised.value, ImageError)  # no image's fault
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.usefixtures("no_child")
def test_a_child_imports_what_decodes_and_no_more() -> None:
    for format in ("JPEG", "PNG"):
        assert isolated(PREPARE)(Value(encode(photo(), format))).error is None
    found: Any = isolated(decoders.modules)(Value(None))
    process, modules = found
    assert process != os.getpid()
    assert {"PIL", "numpy", "simplejpeg"} <= modules
    assert modules & {"torch", "torchvision", "openvino", "timm", "pyspark"} == set()


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("overlap", [False, True])
def test_two_decoding_threads_have_a_child_each(
    overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagevec.stream.prepare", decoders.meeting)
    batch = series([f"{tmp_path}|{number}".encode() for number in range(20)])
    out = rows(
        stream(
            [batch],
            mean_engine,
            batch_size=2,
            decode_threads=2,
            overlap=overlap,
            isolate=True,
            output="struct",
        )
    )
    assert [row["features"][0] for row in out] == list(range(20))
    assert len({row["width"] for row in out}) == 2
    assert os.getpid() not in {row["width"] for row in out}


@pytest.mark.parametrize("decode_threads", [1, 2])
def test_a_crash_is_an_error_row_of_the_stream(
    decode_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagevec.stream.prepare", decoders.fragile_of_stream)
    batch = series([b"a", b"kill", None, b"bb"])
    options: dict[str, Any]
    options = {"isolate": True, "output": "struct", "decode_threads": decode_threads}
    first, crashed, null, last = rows(stream([batch], mean_engine, **options))
    assert crashed["error"] == "crashed: the decoder killed its process"
    assert crashed["features"] is None is null["features"]
    assert (first["features"][0], last["features"][0]) == (1, 2)
    assert first["error"] is null["error"] is last["error"] is None


def test_a_crash_is_raised_where_errors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagevec.stream.prepare", decoders.fragile_of_stream)
    batch = file_batch({"file:/a.png": b"a", "file:/b.png": b"kill"})
    with pytest.raises(ImageError, match=r"crashed: file:/b\.png: the decoder killed"):
        stream([batch], mean_engine, isolate=True, on_error="raise")
