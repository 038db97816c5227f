"""Extractions that are killed, by chance and where it hurts: each image is in the table once."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from pyarrow import parquet

from imagevec import ImageVectorizer, extract
from imagevec.table import sources
from tests.cluster.extract_job import FILES_PER_TASK, OPTIONS, small_tasks
from tests.cluster.slow import PAUSE
from tests.helpers.clusters import kill_tree, session_of
from tests.helpers.images import encode, photo
from tests.helpers.stops import CUT_OFF

WAIT_SECONDS = 180
IMAGES = 400
SEED = 11
VICTIMS = ["worker"] * 13 + ["tree"] * 2 + ["driver"] * 3 + ["jvm"] * 2
# So slow that all the kills come before the end, however fast the machine is.
PAUSE_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 2.5


@pytest.fixture(autouse=True)
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")


def write_images(folder: Path, count: int = IMAGES, seed: int = 0) -> None:
    """Every ninth is none."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        image = encode(photo(40, 30, seed=seed + number)) if number % 9 else b"no image"
        (folder / f"{number}.png").write_bytes(image)


def job(source: Path, dest: Path, *point: str, pause: float = 0.0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cluster.extract_job", str(source), str(dest), *point]
    environment = {**os.environ, PAUSE: str(pause)}
    with dest.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(source: Path, dest: Path) -> None:
    process = job(source, dest)
    try:
        assert process.wait(WAIT_SECONDS) == 0, dest.with_suffix(".log").read_text()[-3000:]
    finally:
        kill_tree(process)


def keys(folder: Path) -> Counter[str]:
    if not folder.is_dir():
        return Counter()
    table = ds.dataset(folder, format="parquet", ignore_prefixes=["_", "."])
    return Counter(table.to_table(columns=["path"])["path"].to_pylist() if table.files else [])


def assert_each_is_there_once(source: Path, dest: Path) -> None:
    """The good images as features, the bad ones as errors, and no trace of a run."""
    bad = Counter(f"file:{p}" for p in source.iterdir() if p.read_bytes() == b"no image")
    assert keys(dest) == Counter(f"file:{path}" for path in source.iterdir()) - bad
    assert keys(dest / "_errors") == bad
    assert not (dest / "_imagevec").exists()


def assert_right(dest: Path, count: int) -> None:
    """The vectors of some images are those of these images."""
    vectorizer = ImageVectorizer(**OPTIONS)
    table = ds.dataset(dest, format="parquet", ignore_prefixes=["_", "."]).to_table()
    for row in sorted(table.to_pylist(), key=lambda row: row["path"])[:count]:
        expected = vectorizer.extract_features(Path(row["path"].removeprefix("file:")).read_bytes())
        assert row["features"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def wait_for(process: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
    """Until a function is true, while the process lives."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not what() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
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
    daemons = [child for child in below if child.parent() in jvms]
    return [child for child in below if child.name().startswith("python") and child not in daemons]


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


def lock_of(dest: Path) -> str | None:
    """The id of the run that holds the lock."""
    try:
        return str(json.loads((dest / "_imagevec" / "lock.json").read_text())["run"])
    except (OSError, ValueError, KeyError):
        return None


def begun(dest: Path, phase: str, before: str | None, parts: int) -> bool:
    """Whether a run, which comes after another one, has come so far."""
    run = lock_of(dest)
    if run in (None, before):
        return False
    if phase == "job":
        return (dest / "_imagevec" / "committed" / str(run)).exists()
    return phase == "lock" or len(list(dest.glob("*.parquet"))) > parts


def test_twenty_kills_at_random(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    write_images(source)
    chance = random.Random(SEED)
    victims = chance.sample(VICTIMS, len(VICTIMS))
    delays = [chance.uniform(0, LONGEST_DELAY_SECONDS) for _ in victims]
    assert len(victims) == 20
    process, run = None, None
    for victim, delay in zip(victims, delays, strict=True):
        if process is None:
            parts = len(list(dest.glob("*.parquet")))
            phase = chance.choice(["lock", "job", "part"])
            process = job(source, dest, pause=PAUSE_SECONDS)
            wait_for(process, functools.partial(begun, dest, phase, run, parts))
            run = lock_of(dest)
        time.sleep(delay)
        strike(process, victim, chance)
        if victim != "worker":
            process = None
    if process is not None:
        kill_tree(process)
    done = sum((keys(dest) + keys(dest / "_errors")).values())
    assert 0 < done < IMAGES
    finish(source, dest)
    assert_each_is_there_once(source, dest)
    assert_right(dest, 20)


def test_kills_while_changed_files_are_replaced(tmp_path: Path) -> None:
    """All files change each time, so that all files of the table are replaced.

    For all points, without kills, see tests/table/test_dest.py.
    """
    source, dest = tmp_path / "source", tmp_path / "dest"
    points = ["first publication", CUT_OFF, "all deletions", "first publication"]
    for number, point in enumerate(points):
        write_images(source, 2 * FILES_PER_TASK, seed=100 * number)
        for path in source.iterdir():  # the bad ones change, too
            os.utime(path, (number + 1, number + 1))
        process = job(source, dest, point)
        try:
            assert process.wait(WAIT_SECONDS) == -signal.SIGKILL, (
                point,
                dest.with_suffix(".log").read_text()[-3000:],
            )
        finally:
            kill_tree(process)
    finish(source, dest)
    assert_each_is_there_once(source, dest)
    assert_right(dest, 2 * FILES_PER_TASK)


BOXES_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("content", pa.binary()),
        (
            "boxes",
            pa.list_(pa.struct([(x, pa.int32()) for x in ("left", "top", "width", "height")])),
        ),
    ]
)
BOX = {"left": 3, "top": 2, "width": 20, "height": 16}
OUTSIDE = {**BOX, "left": 300}


def boxes_of(number: int) -> list[dict[str, int]]:
    """Returns no boxes, or from two to five, of which the second and the fourth are bad."""
    return [BOX, OUTSIDE, BOX, OUTSIDE, BOX][: number % 5 + 1] if number % 5 else []


def write_images_with_boxes(folder: Path, count: int, seed: int) -> None:
    """Writes a table of some files. Every ninth image is none."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        image = encode(photo(40, 30, seed=seed + number)) if number % 9 else b"no image"
        row = {"id": f"{number}", "content": image, "boxes": boxes_of(number)}
        parquet.write_table(pa.Table.from_pylist([row], BOXES_SCHEMA), folder / f"{number}.parquet")


def boxes_in(folder: Path) -> Counter[tuple[str, int | None]]:
    if not folder.is_dir():
        return Counter()
    found = ds.dataset(folder, format="parquet", ignore_prefixes=["_", "."])
    rows = found.to_table(columns=["path", "box_number"]).to_pylist() if found.files else []
    return Counter((row["path"], row["box_number"]) for row in rows)


def test_kills_while_boxes_are_computed_and_replaced(tmp_path: Path) -> None:
    """All images change each time. The last kill comes between the two files of a task."""
    source, dest = tmp_path / "source.parquet", tmp_path / "dest"
    count = 3 * FILES_PER_TASK
    write_images_with_boxes(source, count, seed=0)
    process = job(source, dest, pause=PAUSE_SECONDS)
    wait_for(process, lambda: any(dest.glob("*.parquet")))
    strike(process, "tree", random.Random(SEED))
    for number, point in enumerate(("all deletions", "first publication"), start=1):
        write_images_with_boxes(source, count, seed=100 * number)
        process = job(source, dest, point)
        try:
            assert process.wait(WAIT_SECONDS) == -signal.SIGKILL, (
                point,
                dest.with_suffix(".log").read_text()[-3000:],
            )
        finally:
            kill_tree(process)
    committed = dest / "_imagevec" / "committed" / str(lock_of(dest))
    assert committed.is_dir()
    for path in dest.glob("*.parquet"):
        (committed / "imagevec_kind=errors" / path.name).unlink(missing_ok=True)
    assert 0 < sum(boxes_in(dest).values()) < sum(len(boxes_of(n)) for n in range(count))
    finish(source, dest)
    good: set[tuple[str, int | None]] = set()
    bad: set[tuple[str, int | None]] = set()
    for number in range(count):
        if number % 9 == 0 or not boxes_of(number):
            bad.add((f"{number}", None))
            continue
        for box, each in enumerate(boxes_of(number)):
            (good if each is BOX else bad).add((f"{number}", box))
    assert boxes_in(dest) == Counter(good)
    assert boxes_in(dest / "_errors") == Counter(bad)
    assert not (dest / "_imagevec").exists()
    vectorizer = ImageVectorizer(**OPTIONS)
    table = ds.dataset(dest, format="parquet", ignore_prefixes=["_", "."]).to_table().to_pylist()
    for row in table:
        image = photo(40, 30, seed=200 + int(row["path"])).crop((3, 2, 23, 18))
        expected = vectorizer.extract_features(encode(image))
        assert row["features"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def is_executor(process: psutil.Process) -> bool:
    try:
        return "CoarseGrainedExecutorBackend" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended meanwhile, or is about to
        return False


def executors() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if is_executor(one)]


def test_an_executor_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks are done again by others, and what it had committed is not."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    write_images(source, 60)
    monkeypatch.setattr(sources, "_TASK_BYTES", sources._TASK_BYTES)  # it is put back at the end
    small_tasks()
    killed: list[psutil.Process] = []

    def progress(done: int, errors: int, total: int) -> None:
        if done and not killed:
            killed.append(min(executors(), key=lambda one: one.pid))
            killed[0].kill()

    with session_of("local-cluster[2,1,1024]", **{f"spark__executorEnv__{PAUSE}": "0.1"}) as spark:
        report = extract(source, dest, spark=spark, progress=progress, **OPTIONS)
    assert killed
    assert (report.found, report.features) == (60, 53)
    assert report.errors == {"unsupported_format": 7}
    assert_each_is_there_once(source, dest)
