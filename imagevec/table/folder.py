"""A table in a folder: features, and separately bad images and nulls.

    DEST/part-*.parquet            features
    DEST/_errors/part-*.parquet    bad images and nulls, with the same columns
    DEST/_imagevec/                exists during a run, or after a run was killed
        epochs/                    which run may publish: see ``imagevec.table.fence``
        runs/<run>/                parts that tasks have written: see ``imagevec.table.parts``
        changed/<run>/             published parts that replace rows, until the run ends
        staged/<run>/              files that are written again without the replaced rows
        replace.json               the replaced files, relative to DEST
        replacement/               a table of its own, which replaces this one at the end of a run

New parts are published by moving them. A move can be repeated, because it keeps the file's name,
which is unique. Replacing counts once ``replace.json`` is written: from then on, it is completed,
by the next run if need be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from imagevec.errors import ImageVecError, OptionError
from imagevec.spark.sessions import spark_path
from imagevec.spec import FeatureSpec
from imagevec.storage.folder import Folder
from imagevec.storage.listing import escaped
from imagevec.table.dest import check_fits
from imagevec.table.fence import EPOCHS, RUN_ID
from imagevec.table.parts import ERRORS, FEATURES, Part
from imagevec.table.provenance import provenance
from imagevec.table.publish import Fencing, Publisher

WORK = "_imagevec"
_JOURNAL = "replace.json"
_REPLACEMENT = "replacement"
_PLACES = {FEATURES: "", ERRORS: "_errors/"}
# The files of the table: Spark does not read those that start with a dot or an underscore.
_FILE = re.compile(r"(_errors/)?[^/._][^/]*\.parquet", re.DOTALL)
_ROW_GROUP_BYTES = 64 << 20
_KNOWN = "path string, version string, error string"


class FolderTable:
    """The features and errors in one folder: local, mounted, or in a store of ``storage``."""

    wave_seconds = 0.0
    """The time between two publications."""

    def __init__(self, spark: SparkSession, folder: Folder) -> None:
        self._spark = spark
        self._folder = folder
        self.path = folder.path
        self.work = folder.sub(WORK)

    def run_folder(self, run: str) -> Folder:
        return self.work.sub(f"runs/{run}")

    def published_folders(self, run: str) -> tuple[Folder, ...]:
        """Returns the folders where published parts of a run may be."""
        kinds = [self._changed(run).sub(kind) for kind in _PLACES]
        return (*kinds, self._folder, self._folder.sub(_PLACES[ERRORS].rstrip("/")))

    def check_is_table(self) -> None:
        """Raises ``OptionError`` if the folder contains other data."""
        is_data = any(not name.startswith(("_", ".")) for name in self._folder.names())
        is_begun = _JOURNAL in self.work.names()  # the new files may not be in place
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
        if there is not None:
            check_fits(self.path, there, spec, columns, kept)

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

    def keys_among(self, parts: list[Part], run: str) -> set[str]:
        known = self.known()
        if known is None:
            return set()
        folder = self.run_folder(run)
        files = [escaped(spark_path(folder.sub(part.name).location)) for part in parts]
        staged = self._spark.read.schema("path string").parquet(*files)
        return {row.path for row in staged.join(known, "path", "left_semi").collect()}

    def publish(self, parts: list[Part], run: str) -> None:
        for part in parts:
            place = f"{WORK}/changed/{run}/{part.kind}/" if part.is_changed else _PLACES[part.kind]
            self._folder.move(f"{WORK}/runs/{run}/{part.name}", f"{place}{part.published_name}")

    def finish(self, run: str, outdated: Sequence[str], check: Callable[[], None]) -> None:
        """Replaces the rows of changed images by the parts that a run has computed.

        Args:
            run: The ID of the run.
            outdated: Further paths, whose rows are removed.
            check: Called before anything is replaced.
        """
        changed = self._changed_paths(run)
        if outdated:
            rows = self._spark.createDataFrame([(path,) for path in outdated], "path string")
            changed = rows if changed is None else changed.union(rows)
        if changed is not None:
            old = self._stage_without(changed.distinct(), run)
            check()
            self._replace(old, run)

    def _changed(self, run: str) -> Folder:
        return self.work.sub(f"changed/{run}")

    def _changed_paths(self, run: str) -> DataFrame | None:
        folders = [self._changed(run).sub(kind) for kind in _PLACES]
        places = [escaped(spark_path(folder.location)) for folder in folders if folder.names()]
        if not places:
            return None
        return self._spark.read.schema("path string").parquet(*places)

    def recover(self, fence: Fencing) -> None:
        """Completes the work of dead runs, which ``fence`` has fenced."""
        self._end_replacement()
        for run in self._runs("runs"):
            Publisher(self, fence, run).adopt()
        for run in self._runs("changed"):
            self.finish(run, (), fence.check)
        for name in ("runs", "changed", "staged", "listing", "pending"):
            self.work.delete(name)

    def _runs(self, folder: str) -> list[str]:
        return [name for name in self.work.names(folder) if RUN_ID.fullmatch(name)]

    def replacement(self) -> FolderTable:
        """Returns the table that replaces this one at the end of a run."""
        return FolderTable(self._spark, self.work.sub(_REPLACEMENT))

    def replace_by_replacement(self, check: Callable[[], None]) -> None:
        """Replaces all rows by those of ``replacement``."""
        check()
        self._replace(self.files(), _REPLACEMENT)

    def clear(self) -> None:
        """Deletes the folder."""
        self._folder.delete("")

    def remove_work(self) -> None:
        """Deletes the working files of runs, except their epochs."""
        for name in self.work.names():
            if name != EPOCHS:
                self.work.delete(name)

    def files(self) -> list[str]:
        """Returns the files of the table, relative to it."""
        places = _PLACES.values()
        return [f"{place}{name}" for place in places for name in self._parquet_files(place)]

    def _stage_without(self, paths: DataFrame, run: str) -> list[str]:
        """Writes the files with rows of some paths again, without these rows, as staged files.

        Returns:
            The files that the staged ones replace, relative to the table.
        """
        old: list[str] = []
        for kind, place in _PLACES.items():
            part = self._part(kind)
            if part is None:
                continue
            in_files = part.select("path", F.col("_metadata.file_path").alias("file"))
            holding = in_files.join(paths, "path", "left_semi").select("file").distinct()
            names = [unquote(row.file).rpartition("/")[2] for row in holding.collect()]  # a URI
            if names:
                root = escaped(spark_path(self._folder.location))
                rows = self._spark.read.parquet(*(f"{root}/{place}{escaped(n)}" for n in names))
                rest = rows.join(paths, "path", "left_anti")
                target = self.work.sub(f"staged/{run}/{kind}")
                writer = rest.write.option("parquet.block.size", _ROW_GROUP_BYTES)
                writer.mode("overwrite").parquet(spark_path(target.location))
                old += [f"{place}{name}" for name in names]
        return old

    def _replace(self, old: Sequence[str], run: str) -> None:
        """Replaces files of the table by the staged and changed ones of a run."""
        self.work.write(_JOURNAL, json.dumps({"run": run, "old": list(old)}).encode())
        self._end_replacement()

    def _end_replacement(self) -> None:
        try:
            journal = json.loads(self.work.read(_JOURNAL) or b"")
        except ValueError:
            return  # no replacement began, or it was interrupted before it deleted a file
        run, old = self._checked(journal)
        for file in old:
            self._folder.delete(file)
        for kind, place in _PLACES.items():
            for source in self._replacing(run, kind):
                for name in self._parquet_files(source):
                    self._folder.move(f"{source}/{name}", f"{place}{name}")
        self.work.delete(_JOURNAL)

    def _replacing(self, run: str, kind: str) -> list[str]:
        if run == _REPLACEMENT:
            return [f"{WORK}/{_REPLACEMENT}/{_PLACES[kind]}".rstrip("/")]
        return [f"{WORK}/{folder}/{run}/{kind}" for folder in ("staged", "changed")]

    def _checked(self, journal: Any) -> tuple[str, list[str]]:
        """Returns the run and the files of a journal, which may name only files of this table."""
        try:
            run, old = journal["run"], list(journal["old"])
            is_known_run = run == _REPLACEMENT or RUN_ID.fullmatch(run)
            is_own = is_known_run and all(_FILE.fullmatch(file) for file in old)
        except (KeyError, TypeError):
            is_own = None
        if not is_own:
            raise ImageVecError(
                f"{self.work.path}/{_JOURNAL} names what is not a file of this table: nothing was "
                "deleted. If no run of extract wrote it, delete it"
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
        return reader.parquet(f"{escaped(spark_path(self._folder.location))}/{place}")

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
