"""What imagevec asks of a session and of a data frame's columns."""

from __future__ import annotations

from collections.abc import Iterable

from pyspark import SparkContext
from pyspark.sql import SparkSession
from pyspark.sql.types import BinaryType, StringType, StructType

from imagevec.errors import ImageVecError, OptionError, did_you_mean
from imagevec.images.values import ACCEPTED, IMAGE_FIELDS


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
    fields = set(kind.names) if isinstance(kind, StructType) else set()
    is_struct = fields >= set(IMAGE_FIELDS) or "content" in fields
    if not (isinstance(kind, BinaryType | StringType) or is_struct):
        raise OptionError(f"column {found!r} is of type {kind.simpleString()}: {ACCEPTED}")
    return found
