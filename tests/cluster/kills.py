"""Extractions in processes of their own that are killed, and readers that look on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.helpers.clusters import kill_tree
from tests.helpers.images import encode, photo

WAIT_SECONDS = 180
NO_IMAGE = b"no image"


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """Writes files, of which every ninth is not an image."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        image = encode(photo(40, 30, seed=seed + number)) if number % 9 else NO_IMAGE
        (folder / f"{number}.png").write_bytes(image)


def start(
    source: Path, dest: str | Path, log: Path, *point: str, **environment: str
) -> subprocess.Popen[bytes]:
    """Starts ``tests.cluster.extract_job``. Its output is appended to a log."""
    command = [sys.executable, "-m", "tests.cluster.extract_job", str(source), str(dest), *point]
    with log.open("ab") as output:
        variables = {**os.environ, **environment}
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output)


def wait_for(process: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
    """Waits until a function returns true, while the process lives."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def processes(process: subprocess.Popen[bytes], victim: str) -> list[psutil.Process]:
    """Those that are to be killed, if there are any."""
    driver = psutil.Process(process.pid)
    if victim == "driver":
        return [driver]
    jvms = [child for child in driver.children() if child.name() == "java"]
    if victim == "jvm":
        return jvms
    below = [child for jvm in jvms for child in jvm.children(recursive=True)]
    pythons = [child for child in below if child.name().startswith("python")]
    return [child for child in pythons if child.parent() in pythons]  # not the daemon


def strike(process: subprocess.Popen[bytes], victim: str, chance: random.Random) -> None:
    if victim == "tree":
        kill_tree(process)
        return
    which = chance.random()

    def killed() -> bool:
        try:
            found = sorted(processes(process, victim), key=lambda one: one.pid)
            if found:
                found[int(which * len(found))].kill()
        except psutil.NoSuchProcess:  # it ended meanwhile
            return False
        return bool(found)

    wait_for(process, killed)
    if victim != "worker":
        process.wait(WAIT_SECONDS)


Files = dict[str, str]
"""The names of a table's files, and for each what changes with its content."""


class Reader:
    """Reads the keys of a table again and again, and records what is wrong.

    Args:
        files: Returns the files of the table.
        keys: Returns the keys in a file.
    """

    def __init__(self, files: Callable[[], Files], keys: Callable[[str], Sequence[str]]) -> None:
        self.looks = 0
        self.wrong: list[str] = []
        self._files = files
        self._keys = keys
        self._seen: dict[tuple[str, str], Sequence[str]] = {}

    def look(self) -> None:
        files = self._files().items()
        for file in files:
            if file not in self._seen:
                self._seen[file] = self._keys(file[0])
        counts = Counter(key for file in files for key in self._seen[file])
        self.wrong += [
            f"{key} is there {count} times" for key, count in counts.items() if count > 1
        ]
        self.looks += 1

    @contextmanager
    def looking(self, seconds: float = 0.1) -> Iterator[None]:
        """Looks in a thread of its own until the context exits."""
        end = threading.Event()

        def look() -> None:
            while not end.wait(seconds):
                try:
                    self.look()
                except Exception as error:
                    self.wrong.append(repr(error))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join(WAIT_SECONDS)
