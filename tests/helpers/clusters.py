"""Sessions of clusters on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession


@contextmanager
def session_of(master: str, **conf: str) -> Iterator[SparkSession]:
    """A session of its own; ``__`` in a setting's name stands for a dot."""
    builder = (
        SparkSession.builder.master(master)
        .appName("imagevec cluster tests")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.executor.memory", "512m")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "2")
        .config("spark.python.daemon.module", "imagevec.spark.daemon")  # workers start at once
    )
    for name, value in conf.items():
        builder = builder.config(name.replace("__", "."), value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")  # what is meant to fail is logged in full else
    try:
        yield session
    finally:
        session.stop()
        # A builder is one of the process: what this one set must not reach the next session.
        SparkSession.builder._options.clear()
