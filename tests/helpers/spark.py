"""One Spark session for all tests, and fixtures that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyspark
import pytest
from pyspark.sql import DataFrame, SparkSession

from tests.helpers.images import encode, photo


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """Starts a session with two Python workers."""
    session = (
        SparkSession.builder.master("local[2]")
        .appName("imagevec tests")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.memory", "2g")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.python.daemon.module", "imagevec.spark.daemon")  # workers start at once
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .getOrCreate()
    )
    if pyspark.__version__.startswith("4.0."):  # its pandas API refuses its own default, ANSI mode
        session.conf.set("spark.sql.ansi.enabled", "false")
    session.sparkContext.setLogLevel("OFF")  # otherwise Spark logs expected failures in full
    yield session
    session.stop()


Frame = Callable[..., DataFrame]


@pytest.fixture(scope="session")
def frame(spark: SparkSession) -> Frame:
    """Creates data frames of an ``id`` and an image column, in partitions of about equal size."""

    def make(values: list[object], partitions: int = 2, type: str = "binary") -> DataFrame:
        rows = spark.sparkContext.parallelize(list(enumerate(values)), partitions)
        return spark.createDataFrame(rows, f"id int, content {type}")

    return make


@pytest.fixture
def arrow_rows(spark: SparkSession, request: pytest.FixtureRequest) -> Iterator[int]:
    """Sets the size of Arrow batches, by indirect parametrization."""
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(name)
    spark.conf.set(name, request.param)
    yield request.param
    spark.conf.set(name, str(before))


@pytest.fixture
def jobs_started(spark: SparkSession, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Counts the Spark jobs that the test has started."""
    context = spark.sparkContext
    context.setJobGroup(request.node.name, "counted")
    yield lambda: len(context.statusTracker().getJobIdsForGroup(request.node.name))
    context.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Creates two images and a file that is not an image. One name contains a space."""
    (tmp_path / "a b.png").write_bytes(encode(photo(seed=1)))
    (tmp_path / "c.png").write_bytes(encode(photo(seed=2)))
    (tmp_path / "d.png").write_bytes(b"no image")
    return tmp_path
