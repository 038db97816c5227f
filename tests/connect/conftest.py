"""A Spark Connect session. It cannot share a process with a classic one: run this folder alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
from pyspark.sql import SparkSession

SETTINGS = {
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.connect.grpc.binding.address": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "3",
}

Frame = Callable[[list[object]], object]


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    builder = SparkSession.builder.remote("local[2]")
    for name, value in SETTINGS.items():
        builder = builder.config(name, value)
    with warnings.catch_warnings():
        # The server starts with these settings, and then warns that the client cannot set them.
        warnings.simplefilter("ignore")
        session = builder.getOrCreate()
    yield session
    session.stop()
