"""What imagevec asks of a session and of a data frame's columns."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql.types import BinaryType, StringType, StructType

from imagevec.errors import ImageVecError, OptionError, did_you_mean
from imagevec.images.values import ACCEPTED, FILE_FIELDS, IMAGE_FIELDS

_JAVA = ("java.", "javax.", "org.", "com.", "scala.", "py4j.")


def active_session() -> SparkSession:
    """The session that this thread uses.

    Raises:
        ImageVecError: There is none.
    """
    session = SparkSession.getActiveSession()
    if session is None and SparkContext._active_spark_context is not None:
        session = SparkSession.builder.getOrCreate()  # made, but by another thread
    if session is None:
        raise ImageVecError(
            "there is no active SparkSession: call SparkSession.builder.getOrCreate() first"
        )
    return session


def is_connect(session: SparkSession) -> bool:
    """Whether it is of Spark Connect, which has no JVM of its own."""
    return not hasattr(session, "_jsc")


def is_local(session: SparkSession) -> bool:
    """Whether the workers are on this machine."""
    return str(session.conf.get("spark.master", "")).split("[")[0] == "local"


def gpus_of_tasks(session: SparkSession) -> bool | None:
    """Whether Spark assigns GPUs to tasks; ``None`` if not, and they run on this machine."""
    if session.conf.get("spark.task.resource.gpu.amount", None):
        return True
    return None if is_local(session) else False


def find_column(names: Iterable[str], name: str) -> str | None:
    """The column that Spark takes a name for, whose case does not matter."""
    names = list(names)
    if name in names:
        return name
    return next((known for known in names if known.casefold() == name.casefold()), None)


def existing_column(names: Iterable[str], name: str) -> str:
    """``find_column``, or an ``OptionError`` with the nearest names."""
    names = list(names)
    found = find_column(names, name)
    if found is None:
        raise OptionError(f"there is no column {name!r}: {did_you_mean(name, names)}")
    return found


def quoted(name: str) -> str:
    """A column's name as SQL takes it: without quotes, a dot would lead to a struct's field."""
    return "`" + name.replace("`", "``") + "`"


def check_input_column(schema: StructType, name: str) -> str:
    """The name of the column, as the schema has it.

    Raises:
        OptionError: There is no such column, or it is of a type that is not accepted.
    """
    found = existing_column(schema.names, name)
    kind = schema[found].dataType
    fields = {field.name: field.dataType for field in kind} if isinstance(kind, StructType) else {}
    is_struct = fields.keys() >= set(IMAGE_FIELDS) or any(
        isinstance(fields.get(name), BinaryType) for name in FILE_FIELDS
    )
    if not (isinstance(kind, BinaryType | StringType) or is_struct):
        raise OptionError(f"column {found!r} is of type {kind.simpleString()}: {ACCEPTED}")
    return found


@contextlib.contextmanager
def failures_in_words() -> Iterator[None]:
    """Turns what Spark raises, which fills pages, into an ``ImageVecError`` of one line."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise ImageVecError(cause_of(error)) from error


def cause_of(error: Exception) -> str:
    """The line of Spark's message that says what happened, on a worker or in the JVM."""
    text = str(error)
    if isinstance(error, Py4JJavaError):
        text = f"{error.java_exception.toString()}\n{text}"
    # A traceback of a worker ends with its exception; the cause of a JVM's comes last.
    of_python = re.findall(r"^((?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (.*)$", text, re.M)
    of_python = [(name, said) for name, said in of_python if not name.startswith(_JAVA)]
    if of_python:
        name, said = of_python[-1]
        return said if name.startswith("imagevec.") else f"{name}: {said}"
    first = text.strip().partition("\n")[0]
    of_java = re.findall(r"^Caused by: (.*)$", text, re.M)
    # Spark's own errors begin with their name; but that a task failed says nothing.
    is_told = first.startswith("[") and "TASK" not in first.partition("]")[0]
    line = first if is_told or not of_java else of_java[-1]
    return re.sub(r"^\[[A-Z_.0-9]+\] | ?SQLSTATE: \w+$", "", line)
