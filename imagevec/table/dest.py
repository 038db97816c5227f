"""The table that ``extract`` writes: features, and separately bad images and nulls.

    DEST/part-*.parquet            features
    DEST/_errors/part-*.parquet    bad images and nulls, with the same columns
    DEST/_imagevec/                exists during a run, or after a run was killed
        committed/<run>/           new files, which are moved to their place during the run
        staged/<run>/              new files that replace others
        replace.json               the replaced files, relative to DEST

When a task ends, Spark commits its files, in one folder per kind. If the run is killed, the next
run moves the files in ``committed`` when it starts. A move can be repeated, because it keeps the
file's name, which is unique. Staged files count once ``replace.json`` is written: from then on, the
replacement is completed, by the next run if need be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from imagevec.errors import FingerprintError, ImageVecError, OptionError
from imagevec.spark.hadoop import Folder
from imagevec.spec import FeatureSpec
from imagevec.storage.listing import escaped, glob_parts, matcher
from imagevec.storage.location import Location
from imagevec.table.lock import RUN_ID, Lock
from imagevec.table.provenance import Provenance, check_same, provenance
from imagevec.table.schema import has_boxes

ERRORS = "_errors"
WORK = "_imagevec"
KIND = "imagevec_kind"
_LOCK = "lock.json"
_PLACES = {"features": "", "errors": f"{ERRORS}/"}
# The files of the table: Spark does not read those that start with a dot or an underscore.
_FILE = re.compile(rf"({ERRORS}/)?[^/._][^/]*\.parquet", re.DOTALL)
_ROW_GROUP_BYTES = 64 << 20
_KNOWN = "path string, version string, error string"


class Dest:
    """The features and errors in one folder, on any file system that Spark supports."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._spark = spark
        self._folder = Folder(spark, path)
        self.path = self._folder.path
        self.work = f"{self.path}/{WORK}"
        self._journal = f"{self.work}/replace.json"

    def lock(self, run: str) -> Lock:
        return Lock(self._folder, f"{self.work}/{_LOCK}", run)

    def check_is_table(self) -> None:
        """Raises ``OptionError`` if the folder contains other data."""
        is_data = any(not name.startswith(("_", ".")) for name in self._folder.names())
        is_begun = "replace.json" in self._folder.names(WORK)  # the new files may not be in place
        if is_data and not is_begun and self._any_part() is None:
            raise OptionError(f"{self.path} exists and has no features: choose another DEST")

    def check_is_features(self) -> None:
        """Raises an error if the table contains no features that this version can read."""
        there = self._any_part()
        if there is not None:
            provenance(there)

    def check(self, spec: FeatureSpec, columns: Sequence[str], kept: StructType) -> None:
        """Raises an error if the table has another fingerprint, or other columns.

        ``kept`` has the types of those columns that imagevec does not define.
        """
        there = self._any_part()
        if there is None:
            return
        try:
            check_same(provenance(there), Provenance.of(spec))
        except FingerprintError as error:
            raise FingerprintError(f"{self.path}: {error}. overwrite=True replaces them") from error
        if has_boxes(there.columns) != has_boxes(columns):
            is_by_box = has_boxes(there.columns)
            rows, option = ("box", "set boxes") if is_by_box else ("image", "leave out boxes")
            raise OptionError(
                f"{self.path} has a row for each {rows}: {option}, or use overwrite=True"
            )
        if set(there.columns) != set(columns):
            raise OptionError(
                f"{self.path} has the columns {', '.join(there.columns)}, not "
                f"{', '.join(columns)}: keep the same columns, or use overwrite=True"
            )
        for field in kept:
            type, other = field.dataType.simpleString(), there.schema[field.name].dataType
            if type != other.simpleString():
                raise OptionError(
                    f"{self.path} has the column {field.name!r} of type {other.simpleString()}, "
                    f"not {type}: keep a column of the same type, or use overwrite=True"
                )

    def known(self, retried: Sequence[str] = (), by_box: bool = False) -> DataFrame | None:
        """Returns each key of the table, or ``None`` if the table is empty.

        The columns are ``path``, ``version`` and ``is_retried``: whether the row has an error with
        one of the codes in ``retried``.

        Args:
            retried: Codes of errors.
            by_box: Whether a key has a row for each box. A key that lacks some, because a task was
                killed after it had committed one of its two files, is retried, too.
        """
        known = None
        code = F.substring_index("error", ":", 1)
        count = ["box_count"] if by_box else []
        schema = f"{_KNOWN}, box_count int" if by_box else _KNOWN
        for place in _PLACES.values():
            if self._parquet_files(place):
                rows = self._read(schema, place)
                is_retried = F.coalesce(code.isin(*retried), F.lit(False))
                keys = rows.select("path", "version", is_retried.alias("is_retried"), *count)
                known = keys if known is None else known.union(keys)
        return known if known is None or not by_box else _keys_of_boxes(known)

    def write(self, rows: DataFrame, run: str, is_staged: bool = False) -> None:
        """Runs the job. Each task commits its files when it ends.

        ``rows`` must have a column ``KIND``: ``features`` or ``errors``. Staged files replace
        others: see ``replace``.
        """
        (
            rows.write.mode("append")
            .partitionBy(KIND)
            # Moves a task's files when the task ends, not when the job ends.
            .option("mapreduce.fileoutputcommitter.algorithm.version", "2")
            .option("parquet.block.size", _ROW_GROUP_BYTES)
            .parquet(f"{self.work}/{'staged' if is_staged else 'committed'}/{run}")
        )

    def publish(self, run: str) -> list[str]:
        """Moves the committed files of a run to their place. Returns the paths of error files."""
        return self._move_in(f"committed/{run}")

    def _move_in(self, folder: str) -> list[str]:
        errors = []
        for kind, place in _PLACES.items():
            source = f"{WORK}/{folder}/{KIND}={kind}"
            for name in self._parquet_files(source):
                target = f"{self.path}/{place}{name}"
                self._folder.move(f"{self.path}/{source}/{name}", target)
                if kind == "errors":
                    errors.append(target)
        return errors

    def read(self, files: list[str]) -> DataFrame:
        """Reads some files of the table."""
        return self._spark.read.parquet(*map(escaped, files))

    def recover(self, previous_run: str | None) -> None:
        """Completes the work of a killed run.

        Files that an older run committed are deleted: they come from an executor that outlived its
        driver, and their images were computed again, or will be.
        """
        self._end_replacement()
        if previous_run is not None:
            self.publish(previous_run)
        self.remove_work()

    def remove_work(self) -> None:
        """Deletes the working files of a run, except its lock."""
        for name in self._folder.names(WORK):
            if name != _LOCK:
                self._folder.delete(f"{self.work}/{name}")

    def files(self) -> list[str]:
        """Returns the files of the table, relative to it."""
        places = _PLACES.values()
        return [f"{place}{name}" for place in places for name in self._parquet_files(place)]

    def stage_without(self, paths: DataFrame, run: str) -> list[str]:
        """Rewrites the files with rows of some paths, without these rows, as staged files of a run.

        Returns:
            The files that the staged ones must replace, relative to the table.
        """
        old: list[str] = []
        for kind, place in _PLACES.items():
            part = self._part(kind)
            if part is None:
                continue
            in_files = part.select("path", F.col("_metadata.file_path").alias("file"))
            holding = in_files.join(paths, "path", "left_semi").select("file").distinct()
            files = [unquote(row.file) for row in holding.collect()]  # Spark quotes it as a URI
            if files:
                rest = self.read(files).join(paths, "path", "left_anti")
                writer = rest.write.option("parquet.block.size", _ROW_GROUP_BYTES)
                writer.mode("overwrite").parquet(f"{self.work}/staged/{run}/{KIND}={kind}")
                old += [f"{place}{file.rpartition('/')[2]}" for file in files]
        return old

    def replace(self, old: Sequence[str], run: str) -> list[str]:
        """Replaces files of the table by the staged files of a run. Returns the error files."""
        self._folder.write_text(self._journal, json.dumps({"run": run, "old": list(old)}))
        return self._end_replacement()

    def _end_replacement(self) -> list[str]:
        try:
            journal = json.loads(self._folder.read_text(self._journal) or "")
        except ValueError:
            return []  # no replacement began, or it was interrupted before it deleted a file
        run, old = self._checked(journal)
        for file in old:
            self._folder.delete(f"{self.path}/{file}")
        self._folder.delete_if_empty(f"{self.path}/{ERRORS}")
        errors = self._move_in(f"staged/{run}")
        self._folder.delete(self._journal)
        return errors

    def _checked(self, journal: Any) -> tuple[str, list[str]]:
        """Returns the run and the files of a journal, which may name only files of this table."""
        try:
            run, old = journal["run"], list(journal["old"])
            is_own = RUN_ID.fullmatch(run) and all(_FILE.fullmatch(file) for file in old)
        except (KeyError, TypeError):
            is_own = None
        if not is_own:
            raise ImageVecError(
                f"{self._journal} names what is not a file of this table: nothing was deleted. "
                "If no run of extract wrote it, delete it"
            )
        return run, old

    def _any_part(self) -> DataFrame | None:
        there = (self._part(kind) for kind in _PLACES)
        return next((part for part in there if part is not None), None)

    def _part(self, kind: str) -> DataFrame | None:
        place = _PLACES[kind]
        return self._read(None, place) if self._parquet_files(place) else None

    def _read(self, schema: str | None, place: str) -> DataFrame:
        reader = self._spark.read if schema is None else self._spark.read.schema(schema)
        # Only the data of the table: a user may have put other files next to it.
        reader = reader.option("pathGlobFilter", "*.parquet")
        return reader.parquet(f"{escaped(self.path)}/{place}")

    def _parquet_files(self, folder: str) -> list[str]:
        names = self._folder.names(folder, only_files=True)
        return [name for name in names if _FILE.fullmatch(name)]


def _keys_of_boxes(boxes: DataFrame) -> DataFrame:
    """Returns the keys of boxes. A key that does not have a row for each box is retried."""
    expected = F.coalesce(F.max("box_count"), F.lit(1))  # without boxes, one row of the image
    is_retried = F.bool_or("is_retried") | (F.count("*") != expected)
    return boxes.groupBy("path").agg(
        F.max("version").alias("version"), is_retried.alias("is_retried")
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
