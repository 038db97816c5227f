"""An extraction with the session of the command line, as a process that a test can kill.

    python -m tests.cluster.extract_job SOURCE DEST [POINT]

SOURCE is a folder of images, or a table ``*.parquet`` of images and boxes. Its tasks have a few
files each. At a point of ``tests.helpers.stops`` it kills itself. An environment variable names
another master than ``local[2,4]``, whose settings are those of spark-submit.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from imagevec import extract
from imagevec.cli.session import spark_session
from imagevec.table import sources
from tests.cluster.slow import slow
from tests.helpers.stops import stop_at

MASTER = "IMAGEVEC_TEST_MASTER"
FILES_PER_TASK = 5
OPTIONS: dict[str, Any] = {"model": slow, "weights": "random", "engine": "torch", "batch_size": 1}
BOXES: dict[str, Any] = {"column": "content", "key": "id", "boxes": "boxes"}


def small_tasks() -> None:
    sources._TASK_BYTES = FILES_PER_TASK * sources._LEAST_BYTES


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(source: str, dest: str, point: str | None = None) -> None:
    small_tasks()
    if point is not None:
        stop_at(point, die)
    is_table = source.endswith(".parquet")
    master = os.environ.get(MASTER)
    with spark_session(master or "local[2,4]", recommended=master is None) as spark:
        if is_table:  # a few files a task
            spark.conf.set("spark.sql.files.openCostInBytes", 1)
            spark.conf.set("spark.sql.files.maxPartitionBytes", 20_000)
        print(extract(source, dest, spark=spark, **OPTIONS, **(BOXES if is_table else {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
