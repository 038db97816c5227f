"""The Spark session of a command."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

from py4j.protocol import Py4JError
from pyspark import SparkConf, SparkContext, java_gateway
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError
from imagevec.spark.conf import DAEMON, recommended_conf
from imagevec.spark.sessions import NAMELESS, cause_of, failures_in_words

_LOGGING = Path(__file__).with_name("log4j2.properties")
# Spark adds the module, and no Java option silences the warning.
_INCUBATOR = "WARNING: Using incubator modules"
_SILENCE_SECONDS = 2.0
_IMAGE_BYTES = 200_000  # the size of a typical file, to choose the size of Arrow batches


@contextlib.contextmanager
def spark_session(master: str | None, recommended: bool = True) -> Iterator[SparkSession]:
    """Starts a session. By default, ``recommended_conf`` supplies settings that are not set.

    Raises:
        ImageVecError: Spark does not start, or a query in the session fails.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # For a JVM that this process starts. Spark's log would break the progress bar.
    os.environ.setdefault("SPARK_SUBMIT_OPTS", f"-Dlog4j2.configurationFile={_LOGGING.as_uri()}")
    started: list[Popen[bytes]] = []
    try:
        _start_jvm(started)  # it has the settings of spark-submit
        spark = _builder(master, recommended).getOrCreate()
    except Exception as error:  # no Java, or no such master: PySpark's own message is a page long
        raise ImageVecError(f"Spark did not start: {_why_not_started(error)}") from error
    except KeyboardInterrupt:
        for process in started:  # a JVM that could not report its port would run for ever
            if process.pid:
                process.kill()
                process.wait()
        raise
    try:
        with failures_in_words(), _interrupted_in_silence(spark):
            yield spark
    except ConnectionError as error:
        raise ImageVecError("the Spark JVM exited: run the command again to continue") from error
    finally:
        with contextlib.suppress(ConnectionError, Py4JError):
            spark.stop()


def _why_not_started(error: Exception) -> str:
    if hasattr(os, "getuid"):
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            return NAMELESS
    return cause_of(error)


def _start_jvm(started: list[Popen[bytes]]) -> None:
    """Starts the JVM, and forwards its standard error to ``sys.stderr``.

    A progress bar there keeps other lines separate.

    Args:
        started: The JVM's process is added to it, before it is known whether the start succeeds.
    """

    class Recorded(Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            started.append(self)  # first: an interrupt may come as soon as the process exists
            with _interrupts_deferred():
                super().__init__(*arguments, **named)

    if SparkContext._gateway is not None:
        return
    if os.environ.get("LC_ALL") in ("C", "POSIX"):  # there, Java cannot name a folder with an "é"
        os.environ["LC_ALL"] = "C.UTF-8"
    read_end, write_end = os.pipe()
    threading.Thread(target=_pass_on, args=(read_end,), daemon=True).start()
    # launch_gateway does not return the process if it is interrupted.
    setattr(java_gateway, "Popen", Recorded)  # noqa: B010
    try:
        gateway = launch_gateway(popen_kwargs={"stderr": write_end})  # type: ignore[no-untyped-call]
    finally:
        setattr(java_gateway, "Popen", Popen)  # noqa: B010
        os.close(write_end)
    SparkContext._ensure_initialized(gateway=gateway)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Handles Ctrl-C at the end of the context.

    Python ignores an exception that a signal raises in a function registered for forks. One that is
    raised between the fork and the assignment of its result loses the process ID.
    """
    received: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received and callable(before):
        before(*received[0])


def _pass_on(read_end: int) -> None:
    with open(read_end, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.startswith(_INCUBATOR):
                sys.stderr.write(line)


@contextlib.contextmanager
def _interrupted_in_silence(spark: SparkSession) -> Iterator[None]:
    """Makes Ctrl-C raise ``KeyboardInterrupt`` without log output of Py4J or the JVM."""

    def silence() -> None:
        with contextlib.suppress(ConnectionError, Py4JError):
            spark.sparkContext.setLogLevel("OFF")

    def interrupt(*_: object) -> None:
        logging.disable(logging.CRITICAL)
        # This thread may be using its connection to the JVM; another thread has its own.
        thread = threading.Thread(target=silence, daemon=True)
        thread.start()
        thread.join(_SILENCE_SECONDS)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _builder(master: str | None, recommended: bool) -> Any:
    submitted = SparkConf()
    builder = SparkSession.builder.appName("imagevec")
    if master or not submitted.contains("spark.master"):
        builder = builder.master(master or "local[*]")
    # PySpark's launcher enables it, and it would break the progress bar.
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    settings = {"spark.ui.enabled": "false"}
    if recommended:
        settings |= recommended_conf(image_bytes=_IMAGE_BYTES, executor_cores=1)
        # The user who submits the job chooses the size of executors.
        del settings["spark.executor.cores"], settings["spark.executor.memoryOverhead"]
        if submitted.get("spark.submit.pyFiles"):  # the daemon starts before they are unpacked
            settings.pop(DAEMON, None)
    for name, value in settings.items():
        if not submitted.contains(name):
            builder = builder.config(name, value)
    return builder
