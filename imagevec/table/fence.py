"""Fencing: one run at a time publishes to a table, however many drivers start, hang or wake up.

    <work>/epochs/<epoch>        the run that has the epoch, created conditionally
    <work>/epochs/<epoch>.beat   the time of its last heartbeat, or that it has ended

A run takes the next epoch, which fences all earlier ones: before it publishes what it has listed, a
run checks that no later epoch exists. The next run takes over if the process of the last one is
known to have ended, or if it wrote no heartbeat while it was watched. Clocks of two machines are
compared only to refuse sooner. The first epoch is the time, so that no number is used again after
the epochs were deleted. A run that fails and leaves work to the next one keeps its epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagevec.errors import ImageVecError
from imagevec.storage.folder import Folder
from imagevec.storage.location import UnsupportedURIError

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
RUN_ID = re.compile(r"[0-9a-f]+")  # a run's ID becomes a part of paths
EPOCHS = "epochs"
_EPOCH = re.compile(r"\d{16}")
_SETTLE_SECONDS = 0.5
_ENDED = b"ended"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The run that has an epoch.

    Attributes:
        run: The ID of the run.
        host: The host of its driver.
        place: Where its process ID is valid: see ``_place``.
        process: The process ID of the driver.
        start: When the process started, if that is known.
        user: The user who runs it.
    """

    run: str
    host: str
    place: str
    process: int
    start: str
    user: str

    def __str__(self) -> str:
        return f"process {self.process} of {self.user} on {self.host}"

    @classmethod
    def of_bytes(cls, data: bytes | None) -> Owner | None:
        """Returns ``None`` if the data is not, or not yet, an owner of this version."""
        try:
            owner = cls(**json.loads(data or b""))
            is_own = RUN_ID.fullmatch(owner.run) and isinstance(owner.process, int)
        except (ValueError, TypeError):
            return None
        return owner if is_own else None


class _FencedError(ImageVecError):
    """A later run has taken over."""


class Fence:
    """The right of a run to publish to a table.

    Args:
        work: The folder of working files of the table.
        table: The name of the table, for messages.
        run: The ID of the run, in hex digits.
    """

    def __init__(self, work: Folder, table: str, run: str) -> None:
        self.run = run
        self._work = work
        self._table = table
        self._epoch = 0
        self._is_kept = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Takes the next epoch, and beats until the context exits.

        Raises:
            ImageVecError: Another run is alive, or may be.
        """
        self._take()
        end = threading.Event()
        beating = threading.Thread(target=self._beat, args=(end,), daemon=True)
        beating.start()
        try:
            yield
        finally:
            end.set()
            beating.join()
            with contextlib.suppress(Exception):  # else the next run watches for a heartbeat
                self._end()

    @contextlib.contextmanager
    def kept_if_it_fails(self) -> Iterator[None]:
        """Keeps the epoch if the context fails: what the run has begun counts for the next run."""
        try:
            yield
        except BaseException:
            self._is_kept = True
            raise

    def check(self) -> None:
        """Raises ``ImageVecError`` if a later run has fenced this one."""
        is_last = max(self._epochs(), default=0) == self._epoch
        owner = Owner.of_bytes(self._work.read(_file(self._epoch)))
        if not is_last or owner is None or owner.run != self.run:
            raise _FencedError(f"another run took over {self._table}: this one stops")

    def end_earlier(self) -> None:
        """Deletes the epochs of earlier runs: what they may still begin does not count any more."""
        self.check()
        for epoch in self._epochs():
            if epoch < self._epoch:
                self._delete(epoch)

    def _take(self) -> None:
        last = max(self._epochs(), default=0)
        data = self._work.read(_file(last)) if last else None
        if data is not None:
            owner = Owner.of_bytes(data)
            has_ended = self._work.read(_beat_file(last)) == _ENDED
            if not has_ended and (owner is None or not _has_ended(owner)):
                self._watch(last, owner)
            who = owner or "another run"
            logger.warning(
                "%s was in use by %s, which has ended or stopped: taking over its work",
                self._table,
                who,
            )
        self._epoch = last + 1 if last else int(time.time() * 1000)
        if not create(self._work, _file(self._epoch), _this_process(self.run)):
            raise ImageVecError(f"another run is starting on {self._table}: try again later")

    def _watch(self, epoch: int, owner: Owner | None) -> None:
        """Waits until a run is known to be dead. Raises ``ImageVecError`` if it may be alive."""
        who = owner or "another run"
        beat = self._work.read(_beat_file(epoch))
        age = _age(beat)
        if age is not None and 0 <= age < STALE_SECONDS:
            raise ImageVecError(
                f"{self._table} is in use by {who}, whose last heartbeat was {age:.0f} s ago: "
                f"wait until it ends; if it was killed, wait {STALE_SECONDS:.0f} s"
            )
        logger.warning(
            "%s is in use by %s: waiting %.0f s for a heartbeat", self._table, who, STALE_SECONDS
        )
        deadline = _now() + STALE_SECONDS
        while _now() < deadline:
            time.sleep(1)
            if self._work.read(_beat_file(epoch)) != beat or epoch not in self._epochs():
                raise ImageVecError(f"{self._table} is in use by {who}: wait until it ends")

    def _beat(self, end: threading.Event) -> None:
        while True:
            with contextlib.suppress(Exception):  # an error of the store: one beat may be missed
                self._work.write(_beat_file(self._epoch), str(time.time()).encode())
            if end.wait(BEAT_SECONDS):
                return

    def _end(self) -> None:
        """Deletes the epochs up to this one, which are all dead, or marks a kept one as ended."""
        try:
            self.check()
        except _FencedError:  # a later run may have deleted the epoch before the last heartbeat
            self._work.delete(_beat_file(self._epoch))
        else:
            if self._is_kept:
                self._work.write(_beat_file(self._epoch), _ENDED)
                return
            for epoch in sorted(epoch for epoch in self._epochs() if epoch <= self._epoch):
                self._delete(epoch)
        self._work.delete_empty(EPOCHS)
        self._work.delete_empty("")

    def _delete(self, epoch: int) -> None:
        self._work.delete(_beat_file(epoch))
        self._work.delete(_file(epoch))

    def _epochs(self) -> list[int]:
        return _epochs(self._work)


def runs_with_epochs(work: Folder) -> set[str]:
    """Returns the IDs of the runs that have an epoch."""
    owners = (Owner.of_bytes(work.read(_file(epoch))) for epoch in _epochs(work))
    return {owner.run for owner in owners if owner is not None}


def _epochs(work: Folder) -> list[int]:
    return [int(name) for name in work.names(EPOCHS) if _EPOCH.fullmatch(name)]


def create(folder: Folder, path: str, data: bytes) -> bool:
    """Writes a new file, with unique content. Returns ``False`` if there is one."""
    try:
        return folder.create(path, data)
    except UnsupportedURIError:
        # The store cannot arbitrate. If two drivers write at once, the last one wins.
        if folder.read(path) is not None:
            return False
        folder.write(path, data)
        time.sleep(_SETTLE_SECONDS)
        return folder.read(path) == data


def _file(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:016}"


def _beat_file(epoch: int) -> str:
    return f"{_file(epoch)}.beat"


def _age(beat: bytes | None) -> float | None:
    try:
        return None if beat is None else time.time() - float(beat)
    except ValueError:
        return None


def _this_process(run: str) -> bytes:
    process = os.getpid()
    start = str(_start_of(process))
    me = Owner(run, socket.gethostname(), _place(), process, start, _user())
    return json.dumps(dataclasses.asdict(me)).encode()


def _has_ended(owner: Owner) -> bool:
    """Returns whether the process of an owner is known to have ended."""
    return owner.place == _place() and not _is_alive(owner.process, owner.start)


def _now() -> float:
    """Returns the seconds of a clock that is never set. Linux's monotonic one stops in sleep."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _place() -> str:
    """Identifies the machine since its start, and the container: process IDs are valid there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _is_alive(process: int, start: str) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _start_of(process)
    return now is not None and (now == start or "" in (now, start))


def _start_of(process: int) -> str | None:
    """Returns when a process started, to tell it from a later one with the same ID.

    It is empty if that is unknown, as without Linux's ``/proc``, and ``None`` for a zombie.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] == "Z" else fields[19]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers often use an ID that has no name
        return f"uid {os.getuid()}"
