"""Sessions of clusters on this machine."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
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


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and to all that it started, which may end by themselves meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(30)
