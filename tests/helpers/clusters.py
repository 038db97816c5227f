"""Spark sessions on local clusters."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from pyspark.sql import SparkSession


@contextmanager
def session_of(master: str, **conf: str) -> Iterator[SparkSession]:
    """Starts a new session. ``__`` in the name of a setting means a dot."""
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
    session.sparkContext.setLogLevel("OFF")  # otherwise Spark logs expected failures in full
    try:
        yield session
    finally:
        session.stop()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to a process and its descendants, which may exit in the meantime."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(30)
