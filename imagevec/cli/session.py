"""The Spark session of a command."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError
from imagevec.spark.conf import recommended_conf
from imagevec.spark.sessions import cause_of, failures_in_words

_LOGGING = Path(__file__).with_name("log4j2.properties")
_IMAGE_BYTES = 200_000  # of a typical file, for the size of an Arrow batch


@contextlib.contextmanager
def spark_session(master: str | None, recommended: bool = True) -> Iterator[SparkSession]:
    """A session of its own, with ``recommended_conf`` where nothing else was set, if so wished.

    Raises:
        ImageVecError: Spark does not start, or a query in the session fails.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    logging.getLogger("py4j").setLevel(logging.CRITICAL + 1)  # tracebacks, where it is interrupted
    # Of the JVM, where this process starts it: Spark's log would run through the progress bar.
    os.environ.setdefault("SPARK_SUBMIT_OPTS", f"-Dlog4j2.configurationFile={_LOGGING.as_uri()}")
    try:
        SparkContext._ensure_initialized()  # the JVM, which knows what spark-submit passed on
        spark = _builder(master, recommended).getOrCreate()
    except Exception as error:  # no Java, or no such master: PySpark's own message is a page long
        raise ImageVecError(f"Spark did not start: {cause_of(error)}") from error
    try:
        with failures_in_words():
            yield spark
    finally:
        spark.stop()


def _builder(master: str | None, recommended: bool) -> Any:
    submitted = SparkConf()
    builder = SparkSession.builder.appName("imagevec")
    if master or not submitted.contains("spark.master"):
        builder = builder.master(master or "local[*]")
    # PySpark's launcher switches it on by itself, and it would run through the progress bar.
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    settings = {"spark.ui.enabled": "false"}
    if recommended:
        settings |= recommended_conf(image_bytes=_IMAGE_BYTES, executor_cores=1)
        # How large executors are is for whoever submits.
        del settings["spark.executor.cores"], settings["spark.executor.memoryOverhead"]
    for name, value in settings.items():
        if not submitted.contains(name):
            builder = builder.config(name, value)
    return builder
