"""What the errors of Spark's workers say."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.errors import PySparkException
from pyspark.sql.functions import pandas_udf

from imagevec import ImageVecError
from imagevec.errors import MissingExtraError
from imagevec.plan import make_plan
from imagevec.spark import udf
from imagevec.spark.sessions import failures_in_words, gpus_of_tasks, setting


def message_of(spark, function) -> str:
    """Runs a function in a worker, and returns what ``failures_in_words`` says."""

    @pandas_udf("long")  # type: ignore[call-overload]
    def failing(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for batch in batches:
            function()
            yield batch

    with pytest.raises(ImageVecError) as raised, failures_in_words():
        spark.range(1, numPartitions=1).select(failing("id")).collect()
    return str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_is_named(spark, number):
    message = message_of(spark, lambda: os.kill(os.getpid(), number))
    assert message.startswith("a worker died (Python worker exited unexpectedly")
    for name in ("spark.executor.memoryOverhead", "spark.executor.pyspark.memory", "batch_size"):
        assert name in message
    assert "isolate=True" in message


def no_memory() -> None:
    raise MemoryError


def no_memory_of_numpy() -> None:
    np.empty(1 << 50)


@pytest.mark.parametrize("function", [no_memory, no_memory_of_numpy])
def test_a_lack_of_memory_is_named(spark, function):
    message = message_of(spark, function)
    assert message.startswith("a worker has too little memory (")
    assert "spark.executor.memoryOverhead" in message


def no_module() -> None:
    __import__("no_such_module")


def test_a_module_that_workers_lack_is_named(spark):
    message = message_of(spark, no_module)
    assert message.startswith("the workers' Python has no module 'no_such_module': ")
    assert "Install on the executors" in message


def failing_assertion() -> None:
    raise AssertionError


def test_an_exception_without_a_message_is_named(spark):
    assert message_of(spark, failing_assertion) == "AssertionError"


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "too little memory (MemoryError): raise spark.executor.memoryOverhead"),
        (RuntimeError("can't start new thread"), "too little memory (can't start new thread)"),
        (OSError(12, "Cannot allocate memory"), r"too little memory ([Errno 12]"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "too little"),
        (RuntimeError("Exception from core.cpp:84:\nerr=Cannot allocate memory"), "too little"),
        (MissingExtraError("openvino", "openvino"), "on a worker, openvino is not installed"),
    ],
)
def test_workers_say_what_they_lack(monkeypatch, error, part):
    """In the task's own traceback, which all read who run a query themselves."""

    def lacking(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(udf, "get_engine", lacking)
    plan = make_plan(model="squeezenet1_1", weights="random", engine="torch")
    with pytest.raises(ImageVecError) as raised:
        list(udf.extract_in_worker(iter([pd.Series([b""])]), plan))
    assert part in str(raised.value)


def test_other_errors_of_a_worker_stay_as_they_are(monkeypatch):
    def failing(*arguments: object, **named: object) -> None:
        raise RuntimeError("anything else")

    monkeypatch.setattr(udf, "get_engine", failing)
    plan = make_plan(model="squeezenet1_1", weights="random", engine="torch")
    with pytest.raises(RuntimeError, match="anything else"):
        list(udf.extract_in_worker(iter([pd.Series([b""])]), plan))


def test_setting_that_serverless_compute_does_not_report() -> None:
    def get(*_: str) -> str:
        raise PySparkException(
            "[CONFIG_NOT_AVAILABLE] Configuration spark.master is not available."
        )

    session: Any = SimpleNamespace(conf=SimpleNamespace(get=get))
    assert setting(session, "spark.master", "other") == "other"
    assert gpus_of_tasks(session) is False
