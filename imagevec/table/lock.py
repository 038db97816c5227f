"""A lock for writing to a table: one process at a time, which renews it every few seconds.

A lock is taken over if its processes are known to have ended, or if it was not renewed while this
process watched it. Clocks of two machines are compared only to refuse sooner.
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
from imagevec.spark.hadoop import Folder

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
RUN_ID = re.compile(r"[0-9a-f]+")  # a run's ID becomes a part of paths
_JVM_SECONDS = 30.0  # time for a JVM to exit after its driver
_SETTLE_SECONDS = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The holder of a lock.

    Attributes:
        run: The ID of the run.
        host: The host of its driver.
        place: Where its process IDs are valid: see ``_place``.
        processes: The process IDs of the driver and of its JVM, and when they started.
        user: The user who runs it.
        beat: The time of the last heartbeat, in seconds since 1970.
    """

    run: str
    host: str
    place: str
    processes: tuple[tuple[int, str], ...]
    user: str
    beat: float

    def __str__(self) -> str:
        return f"process {self.processes[0][0]} of {self.user} on {self.host}"

    @classmethod
    def of_text(cls, text: str | None) -> Owner | None:
        """Returns ``None`` if the text is not, or not yet, a lock of this version."""
        try:
            fields = json.loads(text or "")
            processes = tuple((int(number), str(start)) for number, start in fields["processes"])
            owner = cls(**{**fields, "processes": processes})
            return owner if RUN_ID.fullmatch(owner.run) else None
        except (ValueError, TypeError, KeyError):
            return None


class Lock:
    """The lock of a table.

    Attributes:
        run: The ID of this run, in hex digits.
        previous_run: The ID of a run that died and left the lock behind, if any.
    """

    def __init__(self, folder: Folder, file: str, run: str) -> None:
        self.run = run
        self.previous_run: str | None = None
        self._folder = folder
        self._file = file
        self._lost = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lock, and renews it until the context exits.

        Raises:
            ImageVecError: Another process holds the lock, or may hold it.
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
            if not self._is_lost():
                self._folder.delete(self._file)
                self._folder.delete_if_empty(self._file.rpartition("/")[0])

    def check(self) -> None:
        """Raises ``ImageVecError`` if another process has, or may have, taken the lock.

        It may if this process was suspended, or could not reach the store, for too long.
        """
        if self._is_lost():
            raise ImageVecError(f"another run took over {self._folder.path}: this one stops")

    def _take(self) -> None:
        self._renewed = _now()
        if not self._folder.write_text(self._file, self._text(), overwrite=False):
            text = self._folder.read_text(self._file)
            owner = Owner.of_text(text)
            if owner is None or not _has_ended(owner):
                self._watch(text)
            if owner is not None:
                self.previous_run = owner.run
                logger.warning(
                    "%s was locked by %s, which has ended or stopped: taking over its work",
                    self._folder.path,
                    owner,
                )
            self._write()
        # Creating a file is not atomic in Hadoop: if two runs did, the last one has the lock.
        time.sleep(_SETTLE_SECONDS)
        taken = self._owner()
        if taken is None or taken.run != self.run:
            raise ImageVecError(f"another run is locking {self._folder.path}: try again later")

    def _watch(self, text: str | None) -> None:
        """Waits until the lock is stale. Raises ``ImageVecError`` if it is alive, or may be."""
        path, owner = self._folder.path, Owner.of_text(text)
        who = owner or "another run"
        if owner is not None and 0 <= (age := time.time() - owner.beat) < STALE_SECONDS:
            raise ImageVecError(
                f"{path} is locked by {who}, whose last heartbeat was {age:.0f} s ago: "
                f"wait until it ends; if it was killed, wait {STALE_SECONDS:.0f} s"
            )
        logger.warning(
            "%s is locked by %s: waiting %.0f s for a heartbeat", path, who, STALE_SECONDS
        )
        deadline = _now() + STALE_SECONDS
        while _now() < deadline:
            time.sleep(1)
            if self._folder.read_text(self._file) != text:
                raise ImageVecError(f"{path} is locked by {who}: wait until it ends")

    def _beat(self, end: threading.Event) -> None:
        while not end.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # an error of the store: one beat may be missed
                if self._is_lost():
                    return
                self._write()

    def _write(self) -> None:
        now = _now()  # before: a slow store may have it only much later
        self._folder.write_text(self._file, self._text())
        self._renewed = now

    def _is_lost(self) -> bool:
        owner = self._owner()
        if owner is None:  # it is being written, or the run that took it over is done
            is_taken = self._folder.read_text(self._file) is None
        else:
            is_taken = owner.run != self.run
        if is_taken or _now() - self._renewed > STALE_SECONDS:
            self._lost.set()
        return self._lost.is_set()

    def _owner(self) -> Owner | None:
        for _ in range(5):
            owner = Owner.of_text(self._folder.read_text(self._file))
            if owner is not None:
                return owner
            time.sleep(0.2)  # it is being written
        return None

    def _text(self) -> str:
        numbers = (os.getpid(), self._folder.jvm_process())
        processes = tuple((number, str(_start_of(number))) for number in numbers)
        me = Owner(self.run, socket.gethostname(), _place(), processes, _user(), time.time())
        return json.dumps(dataclasses.asdict(me))


def _has_ended(owner: Owner) -> bool:
    """Returns whether all processes of a holder are known to have ended."""
    if owner.place != _place() or _is_alive(*owner.processes[0]):
        return False
    # The driver was killed. Its tasks may still commit until its JVM exits.
    deadline = _now() + _JVM_SECONDS
    while any(_is_alive(*process) for process in owner.processes):
        if _now() >= deadline:
            return False
        time.sleep(0.2)
    return True


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
