"""Queries on Spark sessions and on the columns of data frames."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkContext
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, NumericType, StringType, StructType

from imagevec.errors import ImageVecError, OptionError, did_you_mean
from imagevec.images.boxes import ACCEPTED_BOXES
from imagevec.images.values import ACCEPTED, EXPLODE, FILE_FIELDS, IMAGE_FIELDS, Box
from imagevec.storage.location import Location, UnsupportedURIError

_JAVA = ("java.", "javax.", "org.", "com.", "scala.", "py4j.")

INSTALL_THERE = (
    "install the driver's packages on every executor, or ship them with --archives: see "
    "'Install on the executors' in docs/tuning.md"
)
MORE_MEMORY = (
    "raise spark.executor.memoryOverhead (imagevec.recommended_conf has a value), or "
    "spark.executor.pyspark.memory if it is set; or run fewer tasks at a time, or set a smaller "
    "batch_size"
)
NAMELESS = (
    "this process's user id has no name, which Hadoop needs: add it to /etc/passwd, as the entry "
    "point of Spark's Docker image does, or run as a user with a name"
)
# What Spark says when a worker process or its executor ended without an exception of its own.
_DIED = r"Python worker exited unexpectedly|ExecutorLostFailure .*?Reason: .*"


def active_session() -> SparkSession:
    """Returns the session that this thread uses.

    Raises:
        ImageVecError: No session is active.
    """
    session = SparkSession.getActiveSession()
    if session is None and SparkContext._active_spark_context is not None:
        session = SparkSession.builder.getOrCreate()  # created by another thread
    if session is None:
        raise ImageVecError("no active SparkSession: call SparkSession.builder.getOrCreate() first")
    return session


def is_connect(session: SparkSession) -> bool:
    """Returns whether the session uses Spark Connect, which has no JVM in this process."""
    return not hasattr(session, "_jsc")


def setting(session: SparkSession, name: str, default: str = "") -> str:
    """Returns a setting of Spark. Serverless compute raises an error for most names."""
    try:
        return str(session.conf.get(name, default))
    except PySparkException:
        return default


def is_local(session: SparkSession) -> bool:
    """Returns whether the workers run on this machine."""
    return setting(session, "spark.master").split("[")[0] == "local"


def gpus_of_tasks(session: SparkSession) -> bool | None:
    """Returns whether Spark assigns GPUs to tasks; ``None`` if not and they run on this machine."""
    if setting(session, "spark.task.resource.gpu.amount"):
        return True
    return None if is_local(session) else False


def default_parallelism(session: SparkSession) -> int:
    """Returns the number of tasks that Spark runs at a time, as far as it knows."""
    one_task_each = session.range(10_000).select(F.spark_partition_id().alias("number"))
    (row,) = one_task_each.agg(F.max("number").alias("last")).collect()
    return int(row["last"]) + 1


def spark_path(location: Location) -> str:
    """Returns a location as Spark must get it, whatever its default file system is."""
    if not location.is_local or location.path.startswith("/Volumes/"):
        return str(location)
    if location.path.startswith("/dbfs/"):
        return f"dbfs:{location.path.removeprefix('/dbfs')}"
    return location.uri


# Of other formats, the source may be a name that is not a path.
_FILE_FORMATS = ("parquet", "orc", "avro", "json", "csv", "text", "binaryfile", "image", "delta")


def read_table(spark: SparkSession, src: str, format: str) -> DataFrame:
    """Reads a table of the catalog if the format is ``table``, else a path or a name.

    Raises:
        OptionError: The path does not exist.
    """
    if format == "table":
        return spark.read.table(src)
    path = str(Location.of(src)) if format.lower() in _FILE_FORMATS else src
    try:
        return spark.read.format(format).load(path)
    except AnalysisException as error:
        if "[PATH_NOT_FOUND]" in str(error):
            raise OptionError(f"{src} does not exist") from error
        raise


@contextlib.contextmanager
def cancellable(session: SparkSession, tag: str) -> Iterator[Callable[[], None]]:
    """Tags the jobs of this thread. Yields a function that cancels them, from any thread."""
    if is_connect(session):
        session.addTag(tag)

        def interrupt() -> None:
            session.interruptTag(tag)

        try:
            yield interrupt
        finally:
            session.removeTag(tag)
    else:
        context = session.sparkContext
        context.addJobTag(tag)
        try:
            yield lambda: context.cancelJobsWithTag(tag)
        finally:
            context.removeJobTag(tag)


def find_column(names: Iterable[str], name: str) -> str | None:
    """Returns the column that Spark resolves a name to, ignoring case, or ``None``."""
    names = list(names)
    if name in names:
        return name
    return next((known for known in names if known.casefold() == name.casefold()), None)


def existing_column(names: Iterable[str], name: str) -> str:
    """Like ``find_column``, but raises ``OptionError`` with the nearest names."""
    names = list(names)
    found = find_column(names, name)
    if found is None:
        raise OptionError(f"there is no column {name!r}: {did_you_mean(name, names)}")
    return found


def quoted(name: str) -> str:
    """Quotes a column's name for SQL. Without quotes, a dot would refer to a struct's field."""
    return "`" + name.replace("`", "``") + "`"


def binary_fields(kind: StructType) -> list[str]:
    """Returns the fields of a struct that can contain a file, in the order of preference."""
    fields = {field.name: field.dataType for field in kind}
    return [name for name in FILE_FIELDS if isinstance(fields.get(name), BinaryType)]


def check_input_column(schema: StructType, name: str) -> str:
    """Returns the name of the column as in the schema.

    Raises:
        OptionError: The column does not exist, or its type is not accepted.
    """
    found = existing_column(schema.names, name)
    kind = schema[found].dataType
    if isinstance(kind, ArrayType):
        raise OptionError(f"column {found!r} is of type {kind.simpleString()}: {EXPLODE}")
    is_struct = isinstance(kind, StructType) and (
        set(kind.names) >= set(IMAGE_FIELDS) or bool(binary_fields(kind))
    )
    if not (isinstance(kind, BinaryType | StringType) or is_struct):
        raise OptionError(f"column {found!r} is of type {kind.simpleString()}: {ACCEPTED}")
    return found


def check_boxes_column(schema: StructType, name: str) -> str:
    """Returns the name of a column of boxes as in the schema. A box may have further fields.

    Raises:
        OptionError: The column does not exist, or its type is not accepted.
    """
    found = existing_column(schema.names, name)
    kind = schema[found].dataType
    box = kind.elementType if isinstance(kind, ArrayType) else None
    types = {field.name: field.dataType for field in box} if isinstance(box, StructType) else {}
    if not all(isinstance(types.get(field), NumericType) for field in Box._fields):
        raise OptionError(f"column {found!r} is of type {kind.simpleString()}: {ACCEPTED_BOXES}")
    return found


@contextlib.contextmanager
def failures_in_words() -> Iterator[None]:
    """Converts Spark's exceptions, which fill pages, to an ``ImageVecError`` with one line.

    Those of a URI that is not supported become an ``OptionError``.
    """
    try:
        yield
    except UnsupportedURIError as error:
        raise OptionError(str(error)) from error
    except (PySparkException, Py4JError) as error:
        raise ImageVecError(cause_of(error)) from error


def cause_of(error: Exception) -> str:
    """Returns the line of Spark's message that states the cause, on a worker or in the JVM."""
    text = str(error)
    if isinstance(error, Py4JJavaError):
        text = f"{error.java_exception.toString()}\n{text}"
    return _failure_of_worker(text) or _python_cause(text) or _java_cause(text)


def _failure_of_worker(text: str) -> str | None:
    """Explains a worker that does not start, or dies: it raises no exception that says so."""
    missing = re.search(r"No module named '([\w.]+)'", text)
    if missing:
        sentence = f"the workers' Python has no module {missing[1]!r}: {INSTALL_THERE}"
        if "imagevec.spark.daemon" in text:
            sentence += ". For --py-files, set spark.python.daemon.module=pyspark.daemon"
        return sentence
    unstarted = re.search(r"Error from python worker:\s*(.+)", text)
    if unstarted:
        return f"the Python workers do not start: {unstarted[1]}"
    died = re.search(_DIED, text)
    if died:
        return (
            f"a worker died ({died[0]}). Most likely it used too much memory: {MORE_MEMORY}. If "
            "one image always kills it, set isolate=True"
        )
    if re.search(r"invalid null input: name|Invalid UID", text):
        return NAMELESS
    return None


def _python_cause(text: str) -> str | None:
    # A worker's traceback ends with its exception.
    pattern = r"^((?:[a-z_]\w*\.)*_?[A-Z]\w*(?:Error|Exception))(?:: (.*))?$"
    found = [match for match in re.findall(pattern, text, re.M) if not match[0].startswith(_JAVA)]
    if not found:
        return None
    name, said = found[-1]
    if "MemoryError" in name:
        return f"a worker has too little memory ({said or name}): {MORE_MEMORY}"
    return said if name.startswith("imagevec.") else f"{name}: {said}".removesuffix(": ")


def _java_cause(text: str) -> str:
    # A JVM stack trace ends with the root cause.
    first = text.strip().partition("\n")[0]
    of_java = re.findall(r"^Caused by: (.*)$", text, re.M)
    # Spark's own errors begin with their name, but the failure of a task is not a cause.
    is_told = first.startswith("[") and "TASK" not in first.partition("]")[0]
    line = first if is_told or not of_java else of_java[-1]
    return re.sub(r"^\[[A-Z_.0-9]+\] | ?SQLSTATE: \w+$", "", line)
