"""Workers and executors that die in the middle of a job: every row comes out, and the right one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pyspark.sql import DataFrame, SparkSession

from imagevec import ImageVectorizer, features_udf
from tests.cluster.gate import GATE, OPEN, gated
from tests.helpers.clusters import session_of
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved

IMAGES = [encode(photo(seed=seed)) if seed % 7 else b"no image" for seed in range(24)]
PARTITIONS = 4
WAIT_SECONDS = 180

Rows = list[tuple[int, list[float] | None, str | None]]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "gated.pth"
    saved(gated, path)
    return path


@pytest.fixture(scope="module")
def expected(weights: Path) -> Rows:
    """The same images in this process, without Spark."""
    vectorizer: Any = ImageVectorizer(model=gated, weights=str(weights), engine="torch")
    vectors = [vectorizer.extract_features(image) for image in IMAGES]
    code = "unsupported_format"
    return [(i, vector, None if vector else code) for i, vector in enumerate(vectors)]


def assert_same(rows: Rows, expected: Rows) -> None:
    assert [row[0] for row in rows] == list(range(len(IMAGES)))
    for (_, vector, error), (_, right, right_error) in zip(rows, expected, strict=True):
        assert (error and error.partition(":")[0]) == right_error
        if vector is None or right is None:
            assert vector is right
        else:
            np.testing.assert_allclose(vector, right, rtol=1e-4, atol=1e-6)


def query(spark: SparkSession, weights: Path) -> DataFrame:
    rows = spark.sparkContext.parallelize(list(enumerate(IMAGES)), PARTITIONS)
    column = features_udf(
        "content",
        model=gated,
        weights=str(weights),
        engine="torch",
        batch_size=1,
        output="struct",
    )
    frame = spark.createDataFrame(rows, "id int, content binary")
    return frame.select("id", column.alias("result")).select(
        "id", "result.features", "result.error"
    )


class Job(threading.Thread):
    """A query that collects in a thread."""

    def __init__(self, frame: DataFrame) -> None:
        super().__init__(daemon=True)
        self.frame = frame
        self.outcome: list[Rows] = []

    def run(self) -> None:
        self.frame.sparkSession.sparkContext.setJobGroup(self.name, "cluster test")
        self.outcome.append(sorted(tuple(row) for row in self.frame.collect()))

    def result(self) -> Rows:
        self.join(WAIT_SECONDS)
        assert self.outcome, "the job failed, or did not end"
        return self.outcome[0]


@pytest.fixture
def standalone(standalone_master: str, gate: Path) -> Iterator[SparkSession]:
    for file in gate.iterdir():
        file.unlink()
    conf = {"spark__executorEnv__" + GATE: str(gate), "spark__speculation": "true"}
    with session_of(standalone_master, **conf) as spark:
        yield spark


def workers_at(gate: Path, at_least: int = 1) -> list[psutil.Process]:
    """The Python workers that wait at the gate."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        waiting = [int(file.name) for file in gate.iterdir() if file.name != OPEN]
        if len(waiting) >= at_least:
            return [psutil.Process(pid) for pid in waiting]
        time.sleep(0.05)
    raise TimeoutError("no worker came to the gate")


def executor_of(worker: psutil.Process) -> psutil.Process:
    for parent in worker.parents():
        if "CoarseGrainedExecutorBackend" in " ".join(parent.cmdline()):
            return parent
    raise AssertionError(f"{worker} has no executor above it")


def failed_tasks(spark: SparkSession, job: Job) -> int:
    tracker = spark.sparkContext.statusTracker()
    jobs = [tracker.getJobInfo(number) for number in tracker.getJobIdsForGroup(job.name)]
    stages = [tracker.getStageInfo(number) for info in jobs if info for number in info.stageIds]
    return sum(stage.numFailedTasks for stage in stages if stage)


def itself(worker: psutil.Process) -> psutil.Process:
    return worker


@pytest.mark.parametrize("victim_of", [itself, executor_of])
def test_a_process_that_is_killed_costs_no_row(
    standalone: SparkSession,
    gate: Path,
    weights: Path,
    expected: Rows,
    victim_of: Callable[[psutil.Process], psutil.Process],
) -> None:
    job = Job(query(standalone, weights))
    job.start()
    victim = victim_of(workers_at(gate)[0])
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(30)
    (gate / OPEN).touch()
    assert_same(job.result(), expected)
    assert failed_tasks(standalone, job) >= 1  # it died in the middle of one


def test_executors_that_share_nothing_with_the_driver(weights: Path, expected: Rows) -> None:
    with session_of("local-cluster[2,1,1024]") as spark:
        job = Job(query(spark, weights))
        job.start()
        assert_same(job.result(), expected)
