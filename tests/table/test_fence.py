"""Fencing: which run may publish, on a real folder whose calls can fail, be lost or be watched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from imagevec import ImageVecError
from imagevec.errors import WriteError
from imagevec.storage import retry
from imagevec.storage.folder import Folder
from imagevec.storage.local import LocalStore
from imagevec.storage.location import UnsupportedURIError
from imagevec.table import fence as fence_module
from imagevec.table.fence import EPOCHS, STALE_SECONDS, Fence, Owner, runs_with_epochs

NOW = 1.8e9
FIRST = 7
MINE, THEIRS, THIRD = "1a", "2b", "3c"


class WatchedFolder(Folder):
    """A real folder. ``before`` and ``after`` are called with each method and path."""

    before: Callable[[str, str], object] = staticmethod(lambda method, path: None)
    after: Callable[[str, str], object] = staticmethod(lambda method, path: None)

    def names(self, folder: str = "", only_files: bool = False) -> list[str]:
        return self._watched("names", folder, only_files)

    def read(self, path: str) -> bytes | None:
        return self._watched("read", path)

    def write(self, path: str, data: bytes) -> None:
        self._watched("write", path, data)

    def create(self, path: str, data: bytes) -> bool:
        return self._watched("create", path, data)

    def delete(self, path: str) -> None:
        self._watched("delete", path)

    def _watched(self, method: str, path: str, *arguments: Any) -> Any:
        self.before(method, path)
        result = getattr(super(), method)(path, *arguments)
        self.after(method, path)
        return result


class Clock:
    """Time that passes only in ``sleep``, but no two times are equal."""

    CLOCK_BOOTTIME = 7

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

    def clock_gettime(self, clock: int) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fence_module, "time", clock)
    return clock


@pytest.fixture
def work(tmp_path: Path) -> WatchedFolder:
    return WatchedFolder(tmp_path / "table" / "_imagevec")


def fence_of(work: Folder, run: str = MINE) -> Fence:
    return Fence(work, "/table", run)


def owner(**fields: Any) -> Owner:
    there = Owner(THEIRS, "elsewhere", "boot-1 pid:[1]", 1, "9", "somebody")
    return dataclasses.replace(there, **fields)


def here(process: int, start: str | None = None) -> Owner:
    """A process of this machine and container."""
    start = str(fence_module._start_of(process)) if start is None else start
    return owner(place=fence_module._place(), process=process, start=start)


def put_epoch(
    work: Folder, there: Owner | bytes, beat: float | bytes | None = None, epoch: int = FIRST
) -> None:
    data = there if isinstance(there, bytes) else bytes_of(there)
    work.write(fence_module._file(epoch), data)
    if beat is not None:
        content = beat if isinstance(beat, bytes) else str(beat).encode()
        work.write(fence_module._beat_file(epoch), content)


def bytes_of(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()


def owners(work: Folder) -> dict[int, str]:
    """Returns the run of each epoch."""
    runs = {}
    for name in work.names(EPOCHS):
        if not name.endswith(".beat"):
            owner = Owner.of_bytes(work.read(f"{EPOCHS}/{name}"))
            runs[int(name)] = "" if owner is None else owner.run
    return runs


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def refused(fence: Fence, message: str = "is in use by") -> None:
    with pytest.raises(ImageVecError, match=message), fence.held():
        raise AssertionError("it is not ours")


IS_FENCED = "another run took over /table: this one stops"


def test_epoch_exists_while_it_is_held(work: WatchedFolder) -> None:
    fence = fence_of(work)
    with fence.held():
        [name] = (name for name in work.names(EPOCHS) if not name.endswith(".beat"))
        content = json.loads(work.read(f"{EPOCHS}/{name}") or b"")
        assert content["run"] == MINE and content["host"] == socket.gethostname()
        assert content["process"] == os.getpid()
        fence.check()
    assert not Path(work.path).exists()


def test_epoch_is_released_after_a_failure(work: WatchedFolder) -> None:
    with pytest.raises(ValueError, match="of the test"), fence_of(work).held():
        raise ValueError("of the test")
    assert work.names(EPOCHS) == []


def test_epoch_is_kept_if_a_failure_leaves_work(work: WatchedFolder) -> None:
    fence = fence_of(work)
    with pytest.raises(ValueError, match="of the test"), fence.held():
        with contextlib.suppress(OSError), fence.kept_if_it_fails():
            raise OSError
        raise ValueError("of the test")
    assert runs_with_epochs(work) == {MINE}
    with fence_of(work).held():  # at once, although this process is alive
        pass
    assert work.names(EPOCHS) == []


def test_epochs_are_taken_in_order(work: WatchedFolder) -> None:
    put_epoch(work, here(ended_process()))
    with fence_of(work).held():
        assert owners(work) == {FIRST: THEIRS, FIRST + 1: MINE}
    assert owners(work) == {}


def test_epoch_numbers_increase_after_a_release(work: WatchedFolder, clock: Clock) -> None:
    taken: list[int] = []
    for run in (MINE, THIRD):
        with fence_of(work, run).held():
            taken += owners(work)
    assert taken[0] < taken[1]


def test_epoch_with_recent_beat_is_refused_at_once(work: WatchedFolder, clock: Clock) -> None:
    for there in (owner(), here(os.getpid())):
        put_epoch(work, there, beat=clock.now - STALE_SECONDS / 2)
        refused(fence_of(work), "process .* of somebody on elsewhere, whose last heartbeat was")
        assert owners(work) == {FIRST: THEIRS}
    assert clock.slept == 0


LONG_AGO = NOW - 2 * STALE_SECONDS
LATER = NOW + 3600


@pytest.mark.parametrize("beat", [LONG_AGO, LATER, None], ids=["behind", "ahead", "no beat yet"])
def test_live_owner_is_refused_whatever_its_clock(
    work: WatchedFolder, clock: Clock, beat: float | None
) -> None:
    put_epoch(work, owner(), beat)

    def renew() -> None:
        if clock.slept >= STALE_SECONDS - 2:
            put_epoch(work, owner(), (beat or LONG_AGO) + 10)

    clock.on_sleep = renew
    refused(fence_of(work))
    assert owners(work) == {FIRST: THEIRS}


def test_epoch_that_vanishes_while_it_is_watched_is_refused(
    work: WatchedFolder, clock: Clock
) -> None:
    put_epoch(work, owner(), LONG_AGO)
    clock.on_sleep = lambda: work.delete(EPOCHS)
    refused(fence_of(work))


@pytest.mark.parametrize("beat", [LONG_AGO, LATER, None, b"?"])
@pytest.mark.parametrize(
    "there",
    [
        owner(),
        # The same ID in another container, or before the machine was started again.
        owner(host=socket.gethostname(), process=ended_process()),
        owner(host=socket.gethostname(), place=f"{fence_module._place()}9"),
        # Suspended.
        here(os.getpid()),
    ],
    ids=["elsewhere", "restarted", "container", "suspended"],
)
def test_owner_without_a_new_beat_is_taken_over_after_it_was_watched(
    work: WatchedFolder, there: Owner, beat: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    put_epoch(work, there, beat)
    with caplog.at_level(logging.WARNING), fence_of(work).held():
        assert owners(work) == {FIRST: THEIRS, FIRST + 1: MINE}
        assert clock.slept >= STALE_SECONDS
    assert "/table was in use by process" in caplog.text and "taking over" in caplog.text


def test_owner_in_another_container_of_this_host_is_not_taken_for_dead(
    work: WatchedFolder, clock: Clock
) -> None:
    """Its process ID means nothing here, whatever its host name is."""
    for place in ("boot-1 pid:[1]", f"{fence_module._place()}9"):
        there = owner(host=socket.gethostname(), place=place, process=ended_process())
        put_epoch(work, there, clock.now)
        refused(fence_of(work))


@pytest.mark.parametrize(
    "there",
    [here(ended_process(), "9"), here(os.getpid(), "9")],
    ids=["ended", "another process has the same ID now"],
)
def test_dead_process_is_taken_over_at_once(
    work: WatchedFolder, there: Owner, clock: Clock
) -> None:
    put_epoch(work, there, clock.now)
    with fence_of(work).held():
        assert owners(work)[FIRST + 1] == MINE
    assert clock.slept == 0


def test_process_that_nobody_waited_for_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    assert not fence_module._is_alive(process.pid, "")
    process.wait()


OTHER_VERSION = json.dumps({**dataclasses.asdict(owner()), "epoch": 3}).encode()
OTHER_PATH = json.dumps({**dataclasses.asdict(owner()), "run": "../../elsewhere"}).encode()


@pytest.mark.parametrize(
    "data", [b"", b'{"run": "thei', b"[]", b"{}", b"null", b"\xff", OTHER_VERSION, OTHER_PATH]
)
def test_unreadable_epoch_is_taken_over_after_it_was_watched(
    work: WatchedFolder, data: bytes, clock: Clock
) -> None:
    put_epoch(work, data)
    with fence_of(work).held():
        assert owners(work) == {FIRST: "", FIRST + 1: MINE}
        assert clock.slept >= STALE_SECONDS
    put_epoch(work, data, LONG_AGO)
    clock.on_sleep = lambda: put_epoch(work, data, LONG_AGO + 10)
    refused(fence_of(work), "is in use by another run: wait until it ends")


def test_other_files_beside_epochs_do_not_matter(work: WatchedFolder, clock: Clock) -> None:
    for name in (".DS_Store", "notes", "0000000000000099.beat", "123"):
        work.write(f"{EPOCHS}/{name}", b"")
    with fence_of(work).held():
        assert len(owners_of_runs(work)) == 1
    assert clock.slept == 0


def owners_of_runs(work: Folder) -> list[str]:
    names = [f"{EPOCHS}/{name}" for name in work.names(EPOCHS)]
    found = [Owner.of_bytes(work.read(name)) for name in names]
    return [owner.run for owner in found if owner is not None]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        os.sched_yield()
    assert is_so()


@pytest.mark.parametrize("has_dead_owner", [False, True])
@pytest.mark.parametrize("can_create", [True, False])
def test_of_threads_that_start_at_once_at_most_one_goes_on(
    work: WatchedFolder,
    monkeypatch: pytest.MonkeyPatch,
    has_dead_owner: bool,
    can_create: bool,
) -> None:
    """Of those that hold an epoch after all have taken theirs, one passes the check."""
    count = 8
    monkeypatch.setattr(fence_module, "time", time)
    monkeypatch.setattr(fence_module, "_SETTLE_SECONDS", 0.2)
    if has_dead_owner:
        put_epoch(work, here(ended_process(), "9"))
    if not can_create:
        monkeypatch.setattr(Folder, "create", unsupported)
    start, all_took = threading.Barrier(count), threading.Barrier(count)
    passed = []

    def run(name: str) -> None:
        fence = fence_of(work, name)
        start.wait()
        with contextlib.ExitStack() as stack:
            taken = False
            with contextlib.suppress(ImageVecError):
                stack.enter_context(fence.held())
                taken = True
            all_took.wait()
            with contextlib.suppress(ImageVecError):
                if taken:
                    fence.check()
                    passed.append(name)
            all_took.wait()

    threads = [threading.Thread(target=run, args=(f"{n:x}",)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 1


def unsupported(*arguments: object) -> bool:
    raise UnsupportedURIError("no conditional create")


def test_store_without_conditional_create_has_an_order_of_runs(
    work: WatchedFolder, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(Folder, "create", unsupported)
    fence = fence_of(work)
    with fence.held():
        fence.check()
        [epoch] = owners(work)
        put_epoch(work, here(ended_process(), "9"), epoch=epoch + 1)
        with fence_of(work, THIRD).held():
            assert owners(work) == {epoch: MINE, epoch + 1: THEIRS, epoch + 2: THIRD}
            with pytest.raises(ImageVecError, match=IS_FENCED):
                fence.check()


def test_store_without_conditional_create_keeps_the_last_writer(
    work: WatchedFolder, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(Folder, "create", unsupported)
    put_epoch(work, here(ended_process(), "9"))
    clock.on_sleep = lambda: put_epoch(work, owner(run=THIRD), epoch=FIRST + 1)
    refused(fence_of(work), "another run is starting on /table: try again later")
    assert owners(work) == {FIRST: THEIRS, FIRST + 1: THIRD}


def test_second_that_takes_the_same_epoch_is_refused(work: WatchedFolder) -> None:
    put_epoch(work, here(ended_process(), "9"))

    def other_is_first(method: str, path: str) -> None:
        if method == "create":
            put_epoch(work, owner(run=THIRD), epoch=FIRST + 1)

    work.before = other_is_first
    refused(fence_of(work), "another run is starting on /table: try again later")
    assert owners(work) == {FIRST: THEIRS, FIRST + 1: THIRD}


def test_create_without_an_answer_is_not_taken_for_another_run(
    work: WatchedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request has created the file; its answer was lost; the client asks again."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.0)
    create = LocalStore.create
    tries: list[int] = []

    def loses_answer(store: LocalStore, *arguments: Any) -> None:
        create(store, *arguments)
        if not tries:
            tries.append(1)
            raise ConnectionResetError

    monkeypatch.setattr(LocalStore, "create", loses_answer)
    fence = fence_of(work)
    with fence.held():
        fence.check()
    assert tries == [1]


def test_run_beats_and_survives_a_failing_store(
    work: WatchedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence_module, "BEAT_SECONDS", 0.01)
    beats: list[bytes | None] = []
    fails = 3

    def fail(method: str, path: str) -> None:
        nonlocal fails
        if method == "write" and len(beats) >= 2 and fails:
            fails -= 1
            raise WriteError("the store is down")

    def note(method: str, path: str) -> None:
        if method == "write":
            beats.append(Folder.read(work, path))

    work.before, work.after = fail, note
    fence = fence_of(work)
    with fence.held():
        wait_until(lambda: len(beats) >= 4)
        fence.check()
    assert fails == 0 and len({*beats}) == len(beats)


def test_store_that_fails_during_the_check_is_no_permission(work: WatchedFolder) -> None:
    fence = fence_of(work)

    def fail(method: str, path: str) -> None:
        if method != "write":
            raise WriteError("the store is down")

    with fence.held():
        work.before = fail
        with pytest.raises(WriteError):
            fence.check()
        work.before = WatchedFolder.before
        fence.check()


@pytest.fixture
def fenced(work: WatchedFolder) -> Any:
    """A run that hangs while it holds an epoch, with the number of the epoch."""
    fence = fence_of(work)
    with fence.held():
        [epoch] = owners(work)
        yield fence, epoch


def take_over(work: WatchedFolder, run: str, epoch: int) -> contextlib.AbstractContextManager[None]:
    """Takes the place of the run with an epoch, as if its process had ended."""
    put_epoch(work, here(ended_process(), "9"), epoch=epoch)
    return fence_of(work, run).held()


def is_refused_at_check(fence: Fence) -> bool:
    with contextlib.suppress(ImageVecError):
        fence.check()
        return False
    return True


def test_fenced_run_stops_at_its_check(work: WatchedFolder, fenced: Any) -> None:
    fence, epoch = fenced
    mine = work.read(fence_module._file(epoch))
    assert mine is not None
    with take_over(work, THIRD, epoch):
        work.write(fence_module._file(epoch), mine)  # as it was
        with pytest.raises(ImageVecError, match=IS_FENCED):
            fence.check()
    with pytest.raises(ImageVecError, match=IS_FENCED):  # the other run has ended
        fence.check()
    for run in ("4d", "5e"):  # further runs, which end, or die
        with fence_of(work, run).held():
            assert is_refused_at_check(fence)
    put_epoch(work, owner(run="6f"))
    assert is_refused_at_check(fence)


def test_fenced_run_stops_while_the_epochs_are_deleted(work: WatchedFolder, fenced: Any) -> None:
    """The earliest are deleted first: at no moment is the fenced run's epoch the last one."""
    fence, epoch = fenced
    mine = work.read(fence_module._file(epoch))
    assert mine is not None
    stops: list[bool] = []

    def check(method: str, path: str) -> None:
        if method == "delete":
            work.after = WatchedFolder.after
            stops.append(is_refused_at_check(fence))
            work.after = check

    with take_over(work, THIRD, epoch):
        work.write(fence_module._file(epoch), mine)
        work.after = check
    work.after = WatchedFolder.after
    assert len(stops) == 4 and all(stops)  # two epochs with a beat each


def test_fenced_run_does_not_delete_the_epoch_of_the_other(work: WatchedFolder) -> None:
    fence = fence_of(work)
    with contextlib.ExitStack() as stack:
        with fence.held():
            [epoch] = owners(work)
            stack.enter_context(take_over(work, THIRD, epoch))
        assert owners(work)[epoch + 1] == THIRD
        later = Fence(work, "/table", "4d")
        later._epoch = epoch + 1
        with pytest.raises(ImageVecError, match=IS_FENCED):
            later.check()


@pytest.mark.parametrize("is_kept", [False, True])
def test_fenced_run_leaves_no_heartbeat(work: WatchedFolder, is_kept: bool) -> None:
    """Its heartbeat may come after the other run had deleted its epoch, and had ended."""
    fence = fence_of(work)
    with contextlib.suppress(OSError), fence.held():
        [epoch] = owners(work)
        with take_over(work, THIRD, epoch):
            pass
        work.write(fence_module._beat_file(epoch), b"1")
        if is_kept:
            with fence.kept_if_it_fails():
                raise OSError
    assert work.names() == []


def test_release_that_is_overtaken_leaves_later_epochs(work: WatchedFolder) -> None:
    """A run hangs after the check of its release, and wakes up when another one has taken over."""
    reads = []

    def overtake(method: str, path: str) -> None:
        if method == "read" and not path.endswith(".beat"):
            reads.append(path)
            work.after = WatchedFolder.after
            put_epoch(work, owner(run=THIRD), epoch=int(path.rpartition("/")[2]) + 1)

    fence = fence_of(work)
    with fence.held():
        work.after = overtake
    assert len(reads) == 1
    assert list(owners(work).values()) == [THIRD]


def test_run_that_listed_before_a_release_does_not_share_the_table(
    work: WatchedFolder, clock: Clock
) -> None:
    """One lists the epochs of a run that then ends; another one starts meanwhile, at no epoch."""
    put_epoch(work, here(ended_process(), "9"), epoch=FIRST)
    put_epoch(work, here(ended_process(), "9"), epoch=FIRST + 1)
    slow, quick = fence_of(work, MINE), fence_of(work, THIRD)
    with contextlib.ExitStack() as stack:

        def meanwhile(method: str, path: str) -> None:
            if method == "names":
                work.after = WatchedFolder.after
                work.delete(EPOCHS)
                stack.enter_context(quick.held())

        work.after = meanwhile
        with contextlib.suppress(ImageVecError):
            stack.enter_context(slow.held())
        passes = [not is_refused_at_check(fence) for fence in (slow, quick)]
        assert passes.count(True) == 1


def test_user_without_a_name(work: WatchedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 64321)
    with fence_of(work).held():
        [name] = (name for name in work.names(EPOCHS) if not name.endswith(".beat"))
        assert json.loads(work.read(f"{EPOCHS}/{name}") or b"")["user"] == "uid 64321"
