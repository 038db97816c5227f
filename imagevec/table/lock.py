"""A lock for writing to a table: one process at a time, which renews it every few seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagevec.errors import ImageVecError
from imagevec.spark.hadoop import Folder

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_JVM_SECONDS = 30.0  # time for a JVM to exit after its driver

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The holder of a lock.

    Attributes:
        run: The ID of the run.
        host: The host of its driver.
        processes: The process IDs of the driver and of its JVM.
        user: The user who runs it.
        beat: The time of the last heartbeat, in seconds since 1970.
    """

    run: str
    host: str
    processes: tuple[int, ...]
    user: str
    beat: float

    def __str__(self) -> str:
        return f"process {self.processes[0]} of {self.user} on {self.host}"

    @property
    def age_seconds(self) -> float:
        return time.time() - self.beat


class Lock:
    """The lock of a table.

    Attributes:
        run: The ID of this run.
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
            ImageVecError: Another live process holds the lock.
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
        """Raises ``ImageVecError`` if another process took the lock while this one slept."""
        if self._is_lost():
            raise ImageVecError(f"another run took over {self._folder.path}: this one stops")

    def _take(self) -> None:
        if not self._folder.write_text(self._file, self._text(), overwrite=False):
            owner = self._owner()
            if owner is not None:
                _refuse_if_alive(owner, self._folder.path)
                self.previous_run = owner.run
                logger.warning(
                    "%s was locked by %s, which has exited: taking over its work",
                    self._folder.path,
                    owner,
                )
            self._folder.write_text(self._file, self._text())
            time.sleep(0.5)  # if two runs take over at the same time, the last one wins
        taken = self._owner()
        if taken is None or taken.run != self.run:
            raise ImageVecError(f"{self._folder.path} was just locked by {taken}: try again later")

    def _beat(self, end: threading.Event) -> None:
        while not end.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # an error of the store: one beat may be missed
                if self._is_lost():
                    return
                self._folder.write_text(self._file, self._text())

    def _is_lost(self) -> bool:
        owner = self._owner()
        if owner is not None and owner.run != self.run:
            self._lost.set()
        return self._lost.is_set()

    def _owner(self) -> Owner | None:
        for _ in range(5):
            try:
                fields = json.loads(self._folder.read_text(self._file) or "")
                return Owner(**{**fields, "processes": tuple(fields["processes"])})
            except (ValueError, TypeError, KeyError):  # it is being written
                time.sleep(0.2)
        return None

    def _text(self) -> str:
        processes = (os.getpid(), self._folder.jvm_process())
        me = Owner(self.run, socket.gethostname(), processes, getpass.getuser(), time.time())
        return json.dumps(dataclasses.asdict(me))


def _refuse_if_alive(owner: Owner, path: str) -> None:
    if owner.host == socket.gethostname() and not _is_alive(owner.processes[0]):
        # The driver was killed. Its tasks may still commit until its JVM exits.
        deadline = time.monotonic() + _JVM_SECONDS
        while any(map(_is_alive, owner.processes)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not any(map(_is_alive, owner.processes)):
            return
    if owner.age_seconds < STALE_SECONDS:
        age = max(owner.age_seconds, 0)  # the clocks may differ
        raise ImageVecError(
            f"{path} is locked by {owner}, whose last heartbeat was {age:.0f} s ago: "
            f"wait until it ends; if it was killed, wait {STALE_SECONDS:.0f} s"
        )


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # on Linux: a zombie has exited
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
