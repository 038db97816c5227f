"""The table that ``extract`` writes: features, and separately bad images and nulls.

    DEST/part-*.parquet            features
    DEST/_errors/part-*.parquet    bad images and nulls, with the same columns
    DEST/_imagevec/                exists during a run, or after a run was killed

When a task ends, Spark commits its files to ``_imagevec/committed/<run>``, in one folder per kind.
The driver moves them to their final place during the run. If the run is killed, the next run moves
them when it starts. A move can be repeated, because it keeps the file's name, which is unique.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import unquote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec.errors import FingerprintError, OptionError
from imagevec.spark.hadoop import Folder
from imagevec.spec import FeatureSpec
from imagevec.storage.listing import escaped, glob_parts, matcher
from imagevec.storage.location import Location
from imagevec.table.lock import Lock
from imagevec.table.provenance import Provenance, check_same, provenance

ERRORS = "_errors"
WORK = "_imagevec"
KIND = "imagevec_kind"  # kept columns are assumed not to have this name
_LOCK = "lock.json"
_KEY = "path string, version string"
_PLACES = {"features": "", "errors": f"/{ERRORS}"}
_ROW_GROUP_BYTES = 64 << 20


class Dest:
    """The features and errors in one folder, on any file system that Spark supports."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._spark = spark
        self._folder = Folder(spark, path)
        self.path = self._folder.path
        self.work = f"{self.path}/{WORK}"

    def lock(self, run: str) -> Lock:
        return Lock(self._folder, f"{self.work}/{_LOCK}", run)

    def check_is_table(self) -> None:
        """Raises ``OptionError`` if the folder contains other data."""
        is_data = any(not name.startswith(("_", ".")) for name in self._folder.names())
        if is_data and self._any_part() is None:
            raise OptionError(f"{self.path} exists and has no features: choose another DEST")

    def check(self, spec: FeatureSpec, columns: Sequence[str]) -> None:
        """Raises an error if the table has another fingerprint or other columns."""
        there = self._any_part()
        if there is None:
            return
        try:
            check_same(provenance(there), Provenance.of(spec))
        except FingerprintError as error:
            raise FingerprintError(f"{self.path}: {error}. overwrite=True replaces them") from error
        if set(there.columns) != set(columns):
            raise OptionError(
                f"{self.path} has the columns {', '.join(there.columns)}, not "
                f"{', '.join(columns)}: keep the same columns, or use overwrite=True"
            )

    def clear(self) -> None:
        """Deletes the features and errors, if this is a table of features."""
        there = self._any_part()
        if there is not None and provenance(there):
            for name in (*self._parquet_files(""), ERRORS):
                self._folder.delete(f"{self.path}/{name}")

    def known(self) -> DataFrame | None:
        """Returns ``path`` and ``version`` of every row, or ``None`` if the table is empty."""
        known = None
        for place in _PLACES.values():
            if self._parquet_files(place.lstrip("/")):
                keys = self._read(_KEY, place)
                known = keys if known is None else known.union(keys)
        return known

    def write(self, rows: DataFrame, run: str) -> None:
        """Runs the job. Each task commits its files when it ends.

        ``rows`` must have a column ``KIND``: ``features`` or ``errors``.
        """
        (
            rows.write.mode("append")
            .partitionBy(KIND)
            # Moves a task's files when the task ends, not when the job ends.
            .option("mapreduce.fileoutputcommitter.algorithm.version", "2")
            .option("parquet.block.size", _ROW_GROUP_BYTES)
            .parquet(f"{self.work}/committed/{run}")
        )

    def publish(self, run: str) -> list[str]:
        """Moves the committed files of a run to their place. Returns the paths of error files."""
        errors = []
        for kind, place in _PLACES.items():
            committed = f"{WORK}/committed/{run}/{KIND}={kind}"
            for name in self._parquet_files(committed):
                target = f"{self.path}{place}/{name}"
                self._folder.move(f"{self.path}/{committed}/{name}", target)
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
        if previous_run is not None:
            self.publish(previous_run)
        self._end_replacement()
        self.remove_work()

    def remove_work(self) -> None:
        """Deletes the working files of a run, except its lock."""
        for name in self._folder.names(WORK):
            if name != _LOCK:
                self._folder.delete(f"{self.work}/{name}")

    def take_out(self, changed: DataFrame) -> None:
        """Removes the rows of some paths by rewriting the files that contain them.

        The list of files to delete is written first: see ``_end_replacement``.
        """
        old: list[str] = []
        for kind in _PLACES:
            part = self._part(kind)
            if part is None:
                continue
            in_files = part.select("path", F.col("_metadata.file_path").alias("file"))
            holding = in_files.join(changed, "path", "left_semi").select("file").distinct()
            files = [unquote(row.file) for row in holding.collect()]  # Spark quotes it as a URI
            if files:
                kept = self.read(files).join(changed, "path", "left_anti")
                writer = kept.write.option("parquet.block.size", _ROW_GROUP_BYTES)
                writer.mode("overwrite").parquet(f"{self.work}/kept/{kind}")
                old += files
        self._folder.write_text(f"{self.work}/replace.json", json.dumps(old))
        self._end_replacement()

    def _end_replacement(self) -> None:
        text = self._folder.read_text(f"{self.work}/replace.json")
        try:
            old = json.loads(text or "")
        except ValueError:
            return  # no replacement began, or it was interrupted before it deleted a file
        for file in old:
            self._folder.delete(file)
        for kind, place in _PLACES.items():
            for name in self._parquet_files(f"{WORK}/kept/{kind}"):
                source = f"{self.work}/kept/{kind}/{name}"
                self._folder.move(source, f"{self.path}{place}/{name}")
        self._folder.delete(f"{self.work}/replace.json")
        self._folder.delete(f"{self.work}/kept")

    def _any_part(self) -> DataFrame | None:
        there = (self._part(kind) for kind in _PLACES)
        return next((part for part in there if part is not None), None)

    def _part(self, kind: str) -> DataFrame | None:
        place = _PLACES[kind]
        if not self._parquet_files(place.lstrip("/")):
            return None
        return self._read(None, place)

    def _read(self, schema: str | None, place: str) -> DataFrame:
        reader = self._spark.read if schema is None else self._spark.read.schema(schema)
        # Only the data of the table: a user may have put other files next to it.
        reader = reader.option("pathGlobFilter", "*.parquet")
        return reader.parquet(f"{escaped(self.path)}{place}")

    def _parquet_files(self, folder: str) -> list[str]:
        return [name for name in self._folder.names(folder) if name.endswith(".parquet")]


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
