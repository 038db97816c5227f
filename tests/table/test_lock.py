"""Who may write to a table, with a folder that is a dictionary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import psutil
import pytest

from imagevec import ImageVecError
from imagevec.spark.hadoop import Folder
from imagevec.table import lock as lock_module
from imagevec.table.lock import STALE_SECONDS, Lock, Owner

FILE = "/table/_imagevec/lock.json"
NOW = 1.8e9
MINE, THEIRS, THIRD = "1a", "2b", "3c"


class FakeFolder:
    """Like Hadoop's, it looks whether a file exists, and then creates it."""

    path = "/table"

    def __init__(self, text: str | None = None) -> None:
        self.files = {} if text is None else {FILE: text}
        self.empty: list[str] = []
        self.fails = False
        self.before_create: Callable[[], object] = lambda: None

    def write_text(self, path: str, text: str, overwrite: bool = True) -> bool:
        if self.fails:
            raise OSError("the store is down")
        if path in self.files and not overwrite:
            return False
        if not overwrite:
            self.before_create()
        self.files[path] = text
        return True

    def read_text(self, path: str) -> str | None:
        return self.files.get(path)

    def delete(self, path: str) -> None:
        self.files.pop(path, None)

    def delete_if_empty(self, path: str) -> None:
        self.empty.append(path)

    def jvm_process(self) -> int:
        return os.getpid()


class Clock:
    """Time that passes only in ``sleep``, but no two times are equal."""

    def __init__(self) -> None:
        self.now = NOW
        self.slept = 0.0
        self.on_sleep: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.on_sleep()

    def time(self) -> float:
        self.now += 0.001
        return self.now

    CLOCK_BOOTTIME = 7

    def clock_gettime(self, clock: int) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def lock_of(folder: FakeFolder, run: str = MINE) -> Lock:
    return Lock(cast(Folder, folder), FILE, run)


def owner(**fields: Any) -> Owner:
    there = Owner(THEIRS, "elsewhere", "boot-1 pid:[1]", ((1, "9"),) * 2, "somebody", NOW)
    return dataclasses.replace(there, **fields)


def here(*processes: int, **fields: Any) -> Owner:
    """Processes of this machine."""
    started = tuple((process, str(lock_module._start_of(process))) for process in processes)
    return owner(place=lock_module._place(), processes=started, **fields)


def text_of(owner: Owner) -> str:
    return json.dumps(dataclasses.asdict(owner))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lock_module, "time", clock)
    return clock


def test_a_lock_is_there_while_it_is_held() -> None:
    folder = FakeFolder()
    lock = lock_of(folder)
    with lock.held():
        said = json.loads(folder.files[FILE])
        assert said["run"] == MINE and said["host"] == socket.gethostname()
        assert [process for process, _ in said["processes"]] == [os.getpid()] * 2
        assert lock.previous_run is None
        lock.check()
    assert folder.files == {} and folder.empty == ["/table/_imagevec"]


def test_it_is_given_back_after_a_failure() -> None:
    folder = FakeFolder()
    with pytest.raises(ValueError), lock_of(folder).held():
        raise ValueError
    assert folder.files == {}


@pytest.mark.parametrize("there", [owner(), here(os.getpid(), os.getpid())])
def test_lock_with_recent_beat_is_refused_at_once(there: Owner, clock: Clock) -> None:
    folder = FakeFolder(text_of(there))
    said = "/table is locked by process .* of somebody on .*, whose last heartbeat .*: wait until"
    with pytest.raises(ImageVecError, match=said), lock_of(folder).held():
        raise AssertionError("it is not ours")
    assert folder.files == {FILE: text_of(there)}
    assert clock.slept == 0


LONG_AGO = NOW - 2 * STALE_SECONDS
LATER = NOW + 3600


@pytest.mark.parametrize("beat", [LONG_AGO, LATER], ids=["clock behind", "clock ahead"])
def test_lock_that_is_renewed_is_refused_whatever_its_clock(beat: float, clock: Clock) -> None:
    folder = FakeFolder(text_of(owner(beat=beat)))

    def renew() -> None:
        if clock.slept >= STALE_SECONDS - 2:
            folder.files[FILE] = text_of(owner(beat=beat + 10))

    clock.on_sleep = renew
    with pytest.raises(ImageVecError, match="is locked by"), lock_of(folder).held():
        raise AssertionError("it is not ours")
    assert Owner.of_text(folder.files[FILE]) == owner(beat=beat + 10)


def test_lock_that_vanishes_while_it_is_watched_is_refused(clock: Clock) -> None:
    folder = FakeFolder(text_of(owner(beat=LONG_AGO)))
    clock.on_sleep = folder.files.clear
    with pytest.raises(ImageVecError, match="is locked by"), lock_of(folder).held():
        raise AssertionError("it is not ours")


@pytest.mark.parametrize(
    "there",
    [
        owner(beat=LONG_AGO),
        owner(beat=LATER),
        # The same IDs in another container, or before the machine was started again.
        owner(host=socket.gethostname(), processes=((ended_process(), "9"),) * 2, beat=LONG_AGO),
        # Suspended.
        here(os.getpid(), os.getpid(), beat=LONG_AGO),
    ],
)
def test_lock_without_a_beat_is_taken_over_after_it_was_watched(
    there: Owner, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FakeFolder(text_of(there))
    lock = lock_of(folder)
    with caplog.at_level(logging.WARNING), lock.held():
        assert lock.previous_run == THEIRS
        assert json.loads(folder.files[FILE])["run"] == MINE
        assert clock.slept >= STALE_SECONDS
    assert "/table was locked by process" in caplog.text and "taking over" in caplog.text


def test_lock_of_another_container_on_this_host_is_not_taken(clock: Clock) -> None:
    """Its process IDs mean nothing here, whatever its host name is."""
    processes = ((ended_process(), "9"),) * 2
    for place in ("boot-1 pid:[1]", f"{lock_module._place()}9"):
        host = socket.gethostname()
        there = owner(host=host, place=place, processes=processes)
        folder = FakeFolder(text_of(there))
        with pytest.raises(ImageVecError, match="is locked by"), lock_of(folder).held():
            raise AssertionError("it is not ours")


@pytest.mark.parametrize(
    "processes",
    [
        ((ended_process(), "9"), (ended_process(), "9")),
        ((os.getpid(), "9"), (os.getpid(), "9")),  # another process has the same ID now
    ],
    ids=["ended", "reused"],
)
def test_lock_of_processes_that_ended_is_taken_over_at_once(processes: Any, clock: Clock) -> None:
    there = owner(place=lock_module._place(), processes=processes)
    lock = lock_of(FakeFolder(text_of(there)))
    with lock.held():
        assert lock.previous_run == THEIRS
        assert clock.slept < 1


def test_a_jvm_that_outlives_its_driver_is_waited_for(clock: Clock) -> None:
    """It may still commit."""
    folder = FakeFolder(text_of(here(ended_process(), os.getpid())))
    with pytest.raises(ImageVecError, match="is locked by"), lock_of(folder).held():
        raise AssertionError("it is not ours")
    assert clock.slept > lock_module._JVM_SECONDS - 1


def test_a_process_that_nobody_waited_for_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    assert not lock_module._is_alive(process.pid, "")
    process.wait()


OTHER_VERSION = json.dumps({**dataclasses.asdict(owner()), "epoch": 3})
OTHER_PATH = json.dumps({**dataclasses.asdict(owner()), "run": "../../elsewhere"})


@pytest.mark.parametrize(
    "text", ["", '{"run": "thei', "[]", "{}", "null", OTHER_VERSION, OTHER_PATH]
)
def test_lock_that_cannot_be_read_is_taken_over_if_it_does_not_change(
    text: str, clock: Clock
) -> None:
    folder = FakeFolder(text)
    lock = lock_of(folder)
    with lock.held():
        assert lock.previous_run is None
        assert clock.slept >= STALE_SECONDS
        assert json.loads(folder.files[FILE])["run"] == MINE
    folder.files[FILE] = text
    clock.on_sleep = lambda: folder.write_text(FILE, f"{text} ")
    with pytest.raises(ImageVecError, match="is locked by another run"), lock_of(folder).held():
        raise AssertionError("it is not ours")


def test_of_two_that_create_a_lock_one_has_it() -> None:
    """Both find no file; then both write it."""
    folder = FakeFolder()
    first, second = lock_of(folder, MINE), lock_of(folder, THIRD)

    def second_is_first() -> None:
        folder.before_create = lambda: None
        stack.enter_context(second.held())

    with contextlib.ExitStack() as stack:
        folder.before_create = second_is_first
        stack.enter_context(first.held())
        first.check()
        with pytest.raises(ImageVecError, match="another run took over"):
            second.check()


def test_of_two_that_take_over_one_has_it(clock: Clock) -> None:
    processes = ((ended_process(), "9"),) * 2
    folder = FakeFolder(text_of(owner(place=lock_module._place(), processes=processes)))
    other = text_of(owner(run=THIRD))
    clock.on_sleep = lambda: folder.write_text(FILE, other)
    said = "another run is locking /table"
    with pytest.raises(ImageVecError, match=said), lock_of(folder).held():
        raise AssertionError("it is not ours")
    assert folder.files == {FILE: other}


def test_lock_that_vanishes_after_it_was_written_is_refused(clock: Clock) -> None:
    folder = FakeFolder()
    clock.on_sleep = folder.files.clear
    said = "another run is locking /table: try again later"
    with pytest.raises(ImageVecError, match=said), lock_of(folder).held():
        raise AssertionError("it is not ours")


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        os.sched_yield()
    assert is_so()


def test_a_heart_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    folder = FakeFolder()
    lock = lock_of(folder)
    with lock.held():
        first = folder.files[FILE]
        wait_until(lambda: folder.files[FILE] != first)
        folder.fails = True  # a beat is left out
        time.sleep(0)
        folder.fails = False
        second = folder.files[FILE]
        wait_until(lambda: folder.files[FILE] != second)
        lock.check()


def test_a_lock_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process slept for so long that another one took over."""
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    folder = FakeFolder()
    lock = lock_of(folder)
    other = text_of(owner())
    with lock.held():
        folder.files[FILE] = other
        wait_until(lambda: folder.files[FILE] != other or lock._lost.is_set())
        folder.files[FILE] = other  # a beat was under way
        wait_until(lock._lost.is_set)
        with pytest.raises(ImageVecError, match="another run took over /table: this one stops"):
            lock.check()
    assert folder.files == {FILE: other}


def test_a_loss_is_noticed_before_the_next_beat() -> None:
    folder = FakeFolder()
    lock = lock_of(folder)
    with lock.held():
        folder.files[FILE] = ""  # it is being written
        lock.check()
        folder.files[FILE] = text_of(owner())
        with pytest.raises(ImageVecError, match="another run took over"):
            lock.check()
    assert json.loads(folder.files[FILE])["run"] == THEIRS


def test_lock_is_lost_if_the_run_that_took_over_has_ended() -> None:
    folder = FakeFolder()
    lock = lock_of(folder)
    with lock.held():
        del folder.files[FILE]
        with pytest.raises(ImageVecError, match="another run took over"):
            lock.check()
    assert folder.files == {}


def test_holder_that_could_not_renew_its_lock_stops(clock: Clock) -> None:
    """It was suspended, or its store was down. Nobody else needs to have noticed."""
    lock = lock_of(FakeFolder())
    with lock.held():
        clock.now += STALE_SECONDS - 1
        lock.check()
        clock.now += 2
        with pytest.raises(ImageVecError, match="another run took over"):
            lock.check()


def test_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 64321)
    folder = FakeFolder()
    with lock_of(folder).held():
        assert json.loads(folder.files[FILE])["user"] == "uid 64321"
