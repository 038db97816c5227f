"""Clusters on this machine: their processes are started here, and ended here by their ids."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyspark
import pytest
from pyspark.sql import SparkSession

START_SECONDS = 120

Session = Callable[..., SparkSession]


@pytest.fixture(scope="session")
def standalone_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a master with two workers of one core each, on the loopback interface."""
    folder = tmp_path_factory.mktemp("standalone")
    package = "org.apache.spark.deploy"
    with _spark_class(
        f"{package}.master.Master", "--webui-port", "0", log=folder / "master"
    ) as log:
        url = _wait_for(log, r"Starting Spark master at (spark://\S+)")
        options = ["--webui-port", "0", "--cores", "1", "--memory", "1g"]
        worker = f"{package}.worker.Worker"
        with (
            _spark_class(worker, *options, "-d", f"{folder}/1", url, log=folder / "a") as first,
            _spark_class(worker, *options, "-d", f"{folder}/2", url, log=folder / "b") as second,
        ):
            for log in (first, second):
                _wait_for(log, r"(Successfully registered) with master")
            yield url


@contextmanager
def _spark_class(name: str, *arguments: str, log: Path) -> Iterator[Path]:
    program = Path(pyspark.__file__).parent / "bin" / "spark-class"
    command = [str(program), name, "--host", "127.0.0.1", "--port", "0", *arguments]
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"}
    with log.open("w") as output:
        # spark-class becomes the JVM, so that its id is the JVM's.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield log
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(log: Path, pattern: str) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise TimeoutError(f"no {pattern!r} in:\n{log.read_text()}")
