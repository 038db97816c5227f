"""Who writes to a table: one process at a time, which says every few seconds that it lives."""

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
_JVM_SECONDS = 30.0  # that a JVM without its driver takes to end

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who has a lock.

    Attributes:
        run: The run's id.
        host: Its machine.
        processes: Its driver there, and that one's JVM.
        user: Whose it is.
        beat: When it last said that it lives, in seconds since 1970.
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
    """A lock that is held.

    Attributes:
        run: The id of this run.
        previous_run: The run that left the lock behind when it died, if one did.
    """

    def __init__(self, folder: Folder, file: str, run: str) -> None:
        self.run = run
        self.previous_run: str | None = None
        self._folder = folder
        self._file = file
        self._lost = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lock, and keeps it alive.

        Raises:
            ImageVecError: Another process that lives has it.
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
        """Raises ``ImageVecError`` if another process took the lock, since this one slept."""
        if self._is_lost():
            raise ImageVecError(f"another run took over {self._folder.path}: this one stops")

    def _take(self) -> None:
        if not self._folder.write_text(self._file, self._text(), overwrite=False):
            owner = self._owner()
            if owner is not None:
                _refuse_if_alive(owner, self._folder.path)
                self.previous_run = owner.run
                logger.warning(
                    "%s was locked by %s, which has ended: its work is taken over",
                    self._folder.path,
                    owner,
                )
            self._folder.write_text(self._file, self._text())
            time.sleep(0.5)  # of two that take over at the same time, the last one has it
        taken = self._owner()
        if taken is None or taken.run != self.run:
            raise ImageVecError(f"{self._folder.path} was just locked by {taken}: try again later")

    def _beat(self, end: threading.Event) -> None:
        while not end.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # of the store: a beat may be left out
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
        # Its driver was killed. Tasks of its JVM may still commit until that notices.
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
    with contextlib.suppress(OSError):  # Linux says whether it has ended, and nobody asked how
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
