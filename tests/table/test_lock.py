"""Who may write to a table, with a folder that is a dictionary."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import time
from typing import Any, cast

import psutil
import pytest

from imagevec import ImageVecError
from imagevec.spark.hadoop import Folder
from imagevec.table import lock as lock_module
from imagevec.table.lock import STALE_SECONDS, Lock, Owner

FILE = "/table/_imagevec/lock.json"


class FakeFolder:
    path = "/table"

    def __init__(self, text: str | None = None) -> None:
        self.files = {} if text is None else {FILE: text}
        self.empty: list[str] = []
        self.fails = False

    def write_text(self, path: str, text: str, overwrite: bool = True) -> bool:
        if self.fails:
            raise OSError("the store is down")
        if path in self.files and not overwrite:
            return False
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


def lock_of(folder: FakeFolder, run: str = "mine") -> Lock:
    return Lock(cast(Folder, folder), FILE, run)


def owner(**fields: Any) -> Owner:
    there = Owner("theirs", "elsewhere", (1, 2), "somebody", time.time())
    return dataclasses.replace(there, **fields)


def text_of(owner: Owner) -> str:
    return json.dumps(dataclasses.asdict(owner))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(lock_module, "_JVM_SECONDS", 0.05)


def test_a_lock_is_there_while_it_is_held() -> None:
    folder = FakeFolder()
    lock = lock_of(folder)
    with lock.held():
        said = json.loads(folder.files[FILE])
        assert said["run"] == "mine" and said["host"] == socket.gethostname()
        assert said["processes"] == [os.getpid()] * 2
        assert lock.previous_run is None
        lock.check()
    assert folder.files == {} and folder.empty == ["/table/_imagevec"]


def test_it_is_given_back_after_a_failure() -> None:
    folder = FakeFolder()
    with pytest.raises(ValueError), lock_of(folder).held():
        raise ValueError
    assert folder.files == {}


@pytest.mark.parametrize(
    ("host", "age_seconds"),
    [
        ("elsewhere", 0.0),
        ("elsewhere", -1000.0),  # the clocks differ
        (socket.gethostname(), 0.0),
    ],
)
def test_one_that_lives_is_left_alone(host: str, age_seconds: float) -> None:
    there = owner(host=host, processes=(os.getpid(),) * 2, beat=time.time() - age_seconds)
    folder = FakeFolder(text_of(there))
    said = "/table is locked by process .* of somebody on .*, whose last heartbeat .*: wait until"
    with pytest.raises(ImageVecError, match=said), lock_of(folder).held():
        raise AssertionError("it is not ours")
    assert folder.files == {FILE: text_of(there)}


@pytest.mark.parametrize(
    "there",
    [
        owner(beat=time.time() - STALE_SECONDS - 1),
        owner(host=socket.gethostname(), processes=(ended_process(), ended_process())),
        # Another process has its number by now.
        owner(
            host=socket.gethostname(),
            processes=(os.getpid(), os.getpid()),
            beat=time.time() - STALE_SECONDS - 1,
        ),
    ],
)
def test_one_that_has_ended_is_taken_over(there: Owner, caplog: pytest.LogCaptureFixture) -> None:
    folder = FakeFolder(text_of(there))
    lock = lock_of(folder)
    with caplog.at_level(logging.WARNING), lock.held():
        assert lock.previous_run == "theirs"
        assert json.loads(folder.files[FILE])["run"] == "mine"
    assert "/table was locked by process" in caplog.text and "taking over" in caplog.text


def test_a_jvm_that_outlives_its_driver_is_waited_for() -> None:
    """It may still commit."""
    processes = (ended_process(), os.getpid())
    folder = FakeFolder(text_of(owner(host=socket.gethostname(), processes=processes)))
    with pytest.raises(ImageVecError, match="is locked by"), lock_of(folder).held():
        raise AssertionError("it is not ours")


def test_a_process_that_nobody_waited_for_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    assert not lock_module._is_alive(process.pid)
    process.wait()


@pytest.mark.parametrize("text", ["", '{"run": "thei', "[]", "{}", "null"])
def test_a_lock_that_was_cut_off_is_taken_over(text: str) -> None:
    folder = FakeFolder(text)
    lock = lock_of(folder)
    with lock.held():
        assert lock.previous_run is None
        assert json.loads(folder.files[FILE])["run"] == "mine"


def test_of_two_that_take_over_one_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FakeFolder(text_of(owner(beat=0.0)))
    other = text_of(owner(run="of a third"))
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: folder.write_text(FILE, other))
    with pytest.raises(ImageVecError, match="was just locked by"), lock_of(folder).held():
        raise AssertionError("it is not ours")
    assert folder.files == {FILE: other}


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
    assert json.loads(folder.files[FILE])["run"] == "theirs"
