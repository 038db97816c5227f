"""DEST: the table that ``extract`` writes, in a folder or in a catalog."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.types import StructField, StructType

from imagevec.errors import FingerprintError, OptionError
from imagevec.spec import FeatureSpec
from imagevec.storage.folder import Folder
from imagevec.storage.listing import glob_parts, matcher
from imagevec.storage.location import Location
from imagevec.table.parts import Part
from imagevec.table.provenance import Provenance, check_same
from imagevec.table.publish import Fencing
from imagevec.table.schema import has_boxes


class Dest(Protocol):
    """A table of features, and separately of errors.

    Attributes:
        path: The name of the table, for messages.
        work: The folder for working files, which the workers write.
        wave_seconds: The time between two publications while the job runs.
    """

    path: str
    work: Folder
    wave_seconds: float

    def check_is_table(self) -> None:
        """Raises ``OptionError`` if there is other data in its place."""

    def check_is_features(self) -> None:
        """Raises an error if the table contains no features that this version can read."""

    def check(self, spec: FeatureSpec, columns: Sequence[str], kept: StructType) -> None:
        """Raises an error if the table has another fingerprint, or other columns.

        ``kept`` has the types of those columns that imagevec does not define.
        """

    def known(self, retried: Sequence[str] = (), by_box: bool = False) -> DataFrame | None:
        """Returns each key of the table, or ``None`` if the table is empty.

        The columns are ``path``, ``version`` and ``is_retried``: whether the row has an error with
        one of the codes in ``retried``.

        Args:
            retried: Codes of errors.
            by_box: Whether a key has a row for each box. A key that lacks some, because a driver
                was killed after it had published one of two files, is retried, too.
        """

    def recover(self, fence: Fencing, run: str) -> None:
        """Completes the work of dead runs, which ``fence`` has fenced, in the name of a run."""

    def run_folder(self, run: str) -> Folder:
        """Returns the folder where the tasks of a run write parts."""

    def published_folders(self, run: str) -> tuple[Folder, ...]:
        """Returns the folders where published parts of a run may be."""

    def keys_among(self, parts: list[Part], run: str) -> set[str]:
        """Returns the keys in parts of dead runs that were published: see ``publish.Table``."""

    def publish(self, parts: list[Part], run: str) -> None:
        """Makes parts of a run visible, and removes them from its folder."""

    def finish(self, run: str, outdated: Sequence[str], check: Callable[[], None]) -> None:
        """Replaces the rows of changed images by the parts that a run has computed.

        Args:
            run: The ID of the run.
            outdated: Further paths, whose rows are removed.
            check: Called before anything is replaced.
        """

    def replacement(self) -> FolderDest:
        """Returns the table that replaces this one at the end of a run."""

    def replace_by_replacement(self, run: str, check: Callable[[], None]) -> None:
        """Replaces all rows by those of ``replacement``, in the name of a run."""

    def remove_work(self, run: str) -> None:
        """Deletes the working files of a run, and a replacement, but not the epochs."""


class FolderDest(Dest, Protocol):
    def clear(self) -> None:
        """Deletes the table."""


_KNOWN = ("path", "version", "error")


def known_keys(
    tables: Sequence[DataFrame], retried: Sequence[str], by_box: bool
) -> DataFrame | None:
    """Returns the keys of some tables, or ``None`` without any: see ``Dest.known``."""
    if not tables:
        return None
    columns = [*_KNOWN, "box_count"] if by_box else _KNOWN
    rows = functools.reduce(DataFrame.union, [table.select(*columns) for table in tables])
    code = F.substring_index("error", ":", 1)
    is_retried = F.coalesce(code.isin(*retried), F.lit(False))
    keys = rows.withColumn("is_retried", is_retried).drop("error")
    return _keys_of_boxes(keys) if by_box else keys


def _keys_of_boxes(boxes: DataFrame) -> DataFrame:
    """Returns the keys of boxes. A key that does not have a row for each box is retried."""
    expected = F.coalesce(F.max("box_count"), F.lit(1))  # without boxes, one row of the image
    is_retried = F.bool_or("is_retried") | (F.count("*") != expected)
    return boxes.groupBy("path").agg(
        F.max("version").alias("version"), is_retried.alias("is_retried")
    )


def check_fits(
    table: str,
    there: StructType,
    made_of: Provenance,
    spec: FeatureSpec,
    columns: Sequence[str],
    kept: StructType,
) -> None:
    """Raises an error if a table has another fingerprint, or other columns: see ``Dest.check``."""
    try:
        check_same(made_of, Provenance.of(spec))
    except FingerprintError as error:
        raise FingerprintError(f"{table}: {error}. overwrite=True replaces them") from error
    if has_boxes(there.names) != has_boxes(columns):
        is_by_box = has_boxes(there.names)
        rows, option = ("box", "set boxes") if is_by_box else ("image", "leave out boxes")
        raise OptionError(f"{table} has a row for each {rows}: {option}, or use overwrite=True")
    if set(there.names) != set(columns):
        raise OptionError(
            f"{table} has the columns {', '.join(there.names)}, not "
            f"{', '.join(columns)}: keep the same columns, or use overwrite=True"
        )
    for field in kept:
        type, other = field.dataType.simpleString(), there[field.name].dataType
        if type != other.simpleString():
            raise OptionError(
                f"{table} has the column {field.name!r} of type {other.simpleString()}, "
                f"not {type}: keep a column of the same type, or use overwrite=True"
            )


def check_outside(dest: str, src: str) -> None:
    """Raises ``OptionError`` if DEST is inside SRC, where its files would be read as images."""
    base, *patterns = glob_parts(src)
    here, there = (f"{_comparable(path)}/" for path in (dest, base))
    names = here[len(there) :].split("/")
    is_inside = here.startswith(there) and len(names) > len(patterns)
    if is_inside and all(matcher(p)(name) for p, name in zip(patterns, names, strict=False)):
        raise OptionError(f"DEST is inside SRC, {src}: choose another DEST")


def _comparable(path: str) -> str:
    location = Location.of(path).resolved()
    return f"{location.store_scheme}://{location.host}{location.path.rstrip('/')}"


def result_schema(spec: FeatureSpec, kept: StructType, boxes: T.ArrayType | None) -> StructType:
    """Returns the columns of a result, with the provenance of ``features`` in its metadata."""
    vector: T.DataType = T.ArrayType(T.FloatType())
    if spec.layer_sizes is not None:
        vector = StructType([StructField(layer, vector) for layer in spec.layer_sizes])
    columns = [
        StructField("path", T.StringType()),
        StructField("length", T.LongType()),
        StructField("modificationTime", T.TimestampType()),
        StructField("version", T.StringType()),
        StructField("features", vector, metadata=dict(spec.metadata)),
        StructField("width", T.IntegerType()),
        StructField("height", T.IntegerType()),
        StructField("truncated", T.BooleanType()),
        StructField("error", T.StringType()),
    ]
    if boxes is not None:
        columns += [
            StructField("box", boxes.elementType),
            StructField("box_number", T.IntegerType()),
            StructField("box_count", T.IntegerType()),
        ]
    return StructType([*columns, *kept])
