"""Extractions that are killed, by chance and where it hurts: each image is in the table once."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from pyarrow import parquet

from imagevec import ImageVectorizer, extract
from imagevec.table import sources
from imagevec.table.parts import Part
from tests.cluster.extract_job import FILES_PER_TASK, OPTIONS, small_tasks
from tests.cluster.kills import (
    WAIT_SECONDS,
    Files,
    Reader,
    start,
    strike,
    wait_for,
    write_images,
)
from tests.cluster.slow import PART_SECONDS, PASSES, PAUSE
from tests.helpers.clusters import kill_tree, session_of
from tests.helpers.images import encode, photo
from tests.helpers.stops import CUT_OFF

IMAGES = 500
SEED = 11
VICTIMS = ["worker"] * 13 + ["tree"] * 2 + ["driver"] * 3 + ["jvm"] * 2
# So slow that all the kills come before the end, however fast the machine is.
PAUSE_SECONDS = 0.35
LONGEST_DELAY_SECONDS = 2.5
REFUSED_BEFORE = (3, 10)  # kills before which a second driver is refused


@pytest.fixture(autouse=True)
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")


def job(source: Path, dest: Path, *point: str, pause: float = 0.0) -> subprocess.Popen[bytes]:
    return start(source, dest, dest.with_suffix(".log"), *point, **{PAUSE: str(pause)})


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


def run_of(dest: Path) -> str | None:
    """Returns the ID of the run that has the last epoch."""
    try:
        last = max((dest / "_imagevec" / "epochs").glob("[0-9]" * 16))
        return str(json.loads(last.read_text())["run"])
    except (OSError, ValueError, KeyError):
        return None


def begun(dest: Path, phase: str, before: str | None, parts: int) -> bool:
    """Whether a run, which comes after another one, has come so far."""
    run = run_of(dest)
    if run in (None, before):
        return False
    if phase == "job":
        return (dest / "_imagevec" / "runs" / str(run) / "tasks").exists()
    return phase == "epoch" or len(list(dest.glob("*.parquet"))) > parts


def files_in(dest: Path) -> Files:
    paths = [*dest.glob("*.parquet"), *dest.glob("_errors/*.parquet")]
    return {str(path): str(path.stat().st_mtime_ns) for path in paths}


def keys_in(file: str) -> list[str]:
    keys: list[str] = parquet.read_table(file, columns=["path"])["path"].to_pylist()
    return keys


def assert_refused(source: Path, dest: Path) -> None:
    """A second driver is refused while the first one is alive."""
    log = dest.with_suffix(".second.log")
    process = start(source, dest, log)
    try:
        assert process.wait(WAIT_SECONDS) == 1
    finally:
        kill_tree(process)
    assert "is in use by process" in log.read_text()


def test_twenty_kills_at_random(tmp_path: Path) -> None:
    """Second drivers start, too: they are refused, or take over as soon as the first is killed."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    write_images(source, IMAGES)
    reader = Reader(functools.partial(files_in, dest), keys_in)
    with reader.looking():
        twenty_kills(source, dest, random.Random(SEED))
        done = sum((keys(dest) + keys(dest / "_errors")).values())
        assert 0 < done < IMAGES
        finish(source, dest)
    assert reader.looks > 0 and not reader.wrong
    assert_each_is_there_once(source, dest)
    assert_right(dest, 20)


def twenty_kills(source: Path, dest: Path, chance: random.Random) -> None:
    victims = chance.sample(VICTIMS, len(VICTIMS))
    assert len(victims) == 20
    process, run, is_new = None, None, True
    for number, victim in enumerate(victims):
        if process is None:
            process = job(source, dest, pause=PAUSE_SECONDS)
        if is_new:
            phase = chance.choice(["epoch", "job", "part"])
            files = len(list(dest.glob("*.parquet")))
            wait_for(process, functools.partial(begun, dest, phase, run, files))
            run = run_of(dest)
        time.sleep(chance.uniform(0, LONGEST_DELAY_SECONDS))
        if number in REFUSED_BEFORE:
            assert_refused(source, dest)
        is_new = victim != "worker"
        takes_over = victim in ("driver", "tree")
        later = job(source, dest, pause=PAUSE_SECONDS) if takes_over else None
        strike(process, victim, chance)
        if is_new:
            process = later
    if process is not None:
        kill_tree(process)


def test_kills_while_changed_files_are_replaced(tmp_path: Path) -> None:
    """All files change each time, so that all files of the table are replaced.

    For all points, without kills, see tests/table/test_folder.py.
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
    run = dest / "_imagevec" / "runs" / str(run_of(dest))
    assert run.is_dir()
    for path in dest.glob("*.parquet"):
        (run / f"errors.{path.name}").unlink(missing_ok=True)
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


def workers() -> list[psutil.Process]:
    """Returns the Python workers of the JVM of this process."""
    below = psutil.Process().children(recursive=True)
    pythons = [child for child in below if child.name().startswith("python")]
    return [child for child in pythons if child.parent() in pythons]


def test_a_killed_task_keeps_its_parts(tmp_path: Path) -> None:
    """The next attempt computes exactly the images that are in no part of the first one."""
    source, dest, passes = tmp_path / "source", tmp_path / "dest", tmp_path / "passes"
    for folder in (source, passes):
        folder.mkdir()
    for number in range(16):  # one task
        (source / f"{number}.png").write_bytes(encode(photo(40, 30, seed=number)))
    killed: list[psutil.Process] = []

    def progress(done: int, errors: int, total: int) -> None:
        if done >= 5 and not killed:
            killed.extend(workers())
            for worker in killed:
                worker.kill()

    environment = {PAUSE: "0.5", PART_SECONDS: "0.5", PASSES: str(passes)}
    conf = {f"spark__executorEnv__{name}": value for name, value in environment.items()}
    with session_of("local[1,4]", **conf) as spark:
        report = extract(source, dest, spark=spark, progress=progress, **OPTIONS)
    assert killed
    assert report.features == 16
    assert_each_is_there_once(source, dest)
    written: Counter[int] = Counter()
    for path in dest.glob("*.parquet"):
        part = Part.of_published_name(path.name)
        assert part is not None
        written[part.attempt] += parquet.read_metadata(path).num_rows
    computed = Counter(int(path.name.partition("-")[0]) for path in passes.iterdir())
    first, second = sorted(written)
    assert 5 <= written[first] < 16
    assert written[second] == 16 - written[first]
    # Each worker checks its model with one pass. The first one was killed with an image or two.
    assert computed[second] == 1 + written[second]
    assert computed[first] <= 1 + written[first] + 2
