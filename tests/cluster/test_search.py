"""``imagevec duplicates``, and searches whose workers are killed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from imagevec import near_duplicates, nearest
from imagevec.cli import main
from tests.helpers.clusters import session_of
from tests.helpers.pipeline import run_python

WAIT_SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def on_loopback() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        yield


def write_table(folder: Path, vectors: np.ndarray, *, with_length: bool = True) -> None:
    """In four files."""
    folder.mkdir()
    paths = [f"photos/{place:04d}.jpg" for place in range(len(vectors))]
    columns = {"path": paths, "features": list(vectors)}
    if with_length:
        columns["length"] = [1000 + place for place in range(len(vectors))]
    table = pa.table(columns)
    size = -(-len(vectors) // 4)
    for begin in range(0, len(vectors), size):
        pq.write_table(table.slice(begin, size), folder / f"part-{begin:04d}.parquet")


def with_copies(count: int = 12) -> np.ndarray:
    """The last two are near-copies of the first, the one before of the second."""
    vectors = np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)
    vectors[-2:] = vectors[0] * 1.5 + 0.01
    vectors[-3] = vectors[1] + 0.01
    return vectors


@pytest.mark.parametrize("method", ["exact", "clustered"])
def test_duplicates(capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str) -> None:
    if method == "clustered":
        pytest.importorskip("faiss")
    write_table(tmp_path / "features", with_copies())
    out = tmp_path / "groups"
    options = [str(tmp_path / "features"), "--out", str(out), "--method", method]
    assert main(["duplicates", *options, "--master", "local[2]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "images": 5,
        "groups": 2,
        "extra": 3,
        "extra_bytes": 1009 + 1010 + 1011,
        "out": str(out),
        "min_cosine": 0.95,
    }
    rows = pq.read_table(out).sort_by("path").to_pylist()
    assert [(row["path"][7:11], row["group"][7:11], row["length"]) for row in rows] == [
        ("0000", "0000", 1000),
        ("0001", "0001", 1001),
        ("0009", "0001", 1009),
        ("0010", "0000", 1010),
        ("0011", "0000", 1011),
    ]
    assert main(["duplicates", *options]) == 1
    assert "exists and is not empty: choose another --out" in capsys.readouterr().err


def test_duplicates_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_table(tmp_path / "features [1]", with_copies(), with_length=False)
    table, out = str(tmp_path / "features [1]"), str(tmp_path / "groups {1}")
    Path(table, "README.txt").write_text("a note")
    assert main(["duplicates", table, "--out", out, "--master", "local[2]"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"5 images in 2 groups written to {out}",
        "3 extra: all but one image of each group",
    ]
    none = [table, "--out", str(tmp_path / "none"), "--min-cosine", "1", "--master", "local[2]"]
    write_table(tmp_path / "few", with_copies()[2:9])
    none[0] = str(tmp_path / "few")
    assert main(["duplicates", *none]) == 0
    assert capsys.readouterr().out == "no two images have a cosine of 1.0 or more\n"
    for arguments, message in (
        ([table, "--out", f"{out}2", "--min-cosine", "2"], "min_cosine=2.0 is not valid"),
        ([str(tmp_path / "no"), "--out", f"{out}2"], "no"),
    ):
        assert main(["duplicates", *arguments, "--master", "local[2]"]) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def workers() -> list[psutil.Process]:
    """Below this process; of the daemons that fork them, the children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
            parent = process.parent()
            is_worker = parent is not None and parent.cmdline()[:1] == command[:1]
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
        if is_worker and any("pyspark" in word for word in command):
            found.append(process)
    return found


class KillsWorkers:
    """Kills a worker that has computed for a while, until one is dead."""

    def __init__(self) -> None:
        self.killed = 0
        self._thread = threading.Thread(target=self._kill, daemon=True)
        self._stop = threading.Event()

    def __enter__(self) -> KillsWorkers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def is_at_work(self) -> bool:
        return self._thread.is_alive()

    def _kill(self) -> None:
        end = time.monotonic() + WAIT_SECONDS
        busy: dict[int, float] = {}
        while not self._stop.wait(0.02) and time.monotonic() < end:
            for worker in workers():
                try:
                    used = worker.cpu_times().user
                    first = busy.setdefault(worker.pid, used)
                    if used - first > 0.5:
                        worker.kill()
                        self.killed += 1
                        return
                except psutil.NoSuchProcess:
                    continue


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    with session_of("local[2,4]") as session:  # a task may fail
        yield session


def pairs(frame: DataFrame) -> set[tuple[str, str, float]]:
    return {(row.query, row.neighbour, row.cosine) for row in frame.collect()}


def groups(frame: DataFrame) -> set[tuple[str, str]]:
    return {(row.path, row.group) for row in frame.collect()}


@pytest.mark.parametrize(
    "search",
    [
        lambda features: pairs(nearest(features, features, 5)),
        lambda features: pairs(nearest(features.where("path < 'photos/0100'"), features, 5)),
        lambda features: groups(near_duplicates(features, 0.9)),
    ],
    ids=["features travel", "queries travel", "duplicates"],
)
def test_a_worker_that_is_killed(
    spark: SparkSession, tmp_path: Path, search: Callable[[DataFrame], set[tuple[object, ...]]]
) -> None:
    vectors = np.random.default_rng(0).standard_normal((9000, 512)).astype(np.float32)
    vectors[-50:] = vectors[:50] + 0.01
    write_table(tmp_path / "features", vectors)
    features = spark.read.parquet(str(tmp_path / "features"))
    expected = search(features)
    with KillsWorkers() as killer:
        found = search(features)
        while killer.is_at_work():  # the search was too quick for it
            found = search(features)
    assert found == expected
    assert killer.killed == 1


SEARCH = """
import os, pathlib
import numpy as np
from imagevec import near_duplicates, nearest
from pyspark.sql import SparkSession

disk, temporary, master = os.environ["DISK"], os.environ["TMPDIR"], os.environ["MASTER"]
spark = (
    SparkSession.builder.master(master)
    .config("spark.driver.host", "127.0.0.1")
    .config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.ui.enabled", "false")
    .config("spark.sql.shuffle.partitions", "2")
    .config("spark.local.dir", disk)
    .getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")
rows = [(f"p{i}", [float(x) for x in np.random.default_rng(i).random(8)]) for i in range(60)]
features = spark.createDataFrame(rows, "path string, features array<float>")
result = nearest(features, features, 2)
groups = near_duplicates(features, 0.99999)

def files(folder):
    return sorted(path.name for path in pathlib.Path(folder).rglob("imagevec-*"))

assert files(disk) and not files(temporary), (files(disk), files(temporary))
assert result.count() == 120 and groups.count() == 0
spark.stop()
if master == "local[2]":
    assert not files(disk), files(disk)
print("done")
"""


@pytest.mark.parametrize("master", ["local[2]", "local-cluster[2,1,1024]"])
def test_files_are_on_the_disk_of_spark_and_go_with_its_context(
    tmp_path: Path, master: str
) -> None:
    disk, temporary = tmp_path / "disk", tmp_path / "tmp"
    disk.mkdir()
    temporary.mkdir()
    printed = run_python(SEARCH, DISK=str(disk), TMPDIR=str(temporary), MASTER=master)
    assert printed.splitlines()[-1] == "done"
    assert not list(disk.rglob("imagevec-*"))
