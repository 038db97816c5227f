"""A table in a folder: features, and separately bad images and nulls.

    DEST/part-*.parquet            features
    DEST/_errors/part-*.parquet    bad images and nulls, with the same columns
    DEST/_imagevec/                exists during a run, or after a run was killed
        epochs/                    which run may publish: see ``imagevec.table.fence``
        runs/<run>/                parts that tasks have written: see ``imagevec.table.parts``
        changed/<run>/             published parts that replace rows, until the run ends
        staged/<run>/              files that are written again without the replaced rows
        replace-<run>.json         the replaced and the new files of a run, relative to DEST
        replacement/               a table of its own, which replaces this one at the end of a run

New parts are published by moving them. A move can be repeated, because it keeps the file's name,
which is unique. Replacing counts once ``replace-<run>.json`` is written: from then on, it is
completed, by the next run if need be, which then deletes the epochs of earlier runs. A journal of a
run without an epoch does not count: that run was fenced before it wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import IntegerType, StringType, StructField, StructType

from imagevec.errors import ImageVecError, OptionError
from imagevec.spark.sessions import existing_column
from imagevec.spec import FeatureSpec
from imagevec.storage.folder import Folder
from imagevec.table.dest import check_fits, known_keys
from imagevec.table.fence import RUN_ID, runs_with_epochs
from imagevec.table.files import read_files, rewrite_files, schema_of
from imagevec.table.parts import ERRORS, FEATURES, Part
from imagevec.table.provenance import Provenance
from imagevec.table.publish import Fencing, Publisher

WORK = "_imagevec"
_JOURNAL = re.compile(r"replace-([0-9a-f]+)\.json")
_REPLACEMENT = "replacement"
_PLACES = {FEATURES: "", ERRORS: "_errors/"}
# The files of the table: Spark does not read those that start with a dot or an underscore.
_FILE = re.compile(r"(_errors/)?[^/._][^/]*\.parquet", re.DOTALL)
_OF_RUNS = ("runs", "changed", "staged", "listing", "pending")
_KNOWN = [StructField(name, StringType()) for name in ("path", "version", "error")]
_BOX_COUNT = StructField("box_count", IntegerType())
_PATHS = StructType(_KNOWN[:1])


class _Journal(NamedTuple):
    """A replacement of files that has begun.

    Attributes:
        source: The run whose staged and changed files are put in the table, or ``_REPLACEMENT``.
        old: The files that are deleted, as their names in the table.
        new: The files that are put in the table.
    """

    source: str
    old: list[str]
    new: list[str]


def _journal_file(run: str) -> str:
    return f"replace-{run}.json"


class FolderTable:
    """The features and errors in one folder: local, mounted, or in a store of ``storage``."""

    wave_seconds = 0.0
    """The time between two publications."""

    def __init__(
        self, spark: SparkSession, folder: Folder, fenced_by: Folder | None = None
    ) -> None:
        self._spark = spark
        self._folder = folder
        self.path = folder.path
        self.work = folder.sub(WORK)
        self._fenced_by = fenced_by or self.work  # the folder with epochs

    def run_folder(self, run: str) -> Folder:
        return self.work.sub(f"runs/{run}")

    def published_folders(self, run: str) -> tuple[Folder, ...]:
        """Returns the folders where published parts of a run may be."""
        kinds = [self._changed(run).sub(kind) for kind in _PLACES]
        return (*kinds, self._folder, self._folder.sub(_PLACES[ERRORS].rstrip("/")))

    def check_is_table(self) -> None:
        """Raises ``OptionError`` if the folder contains other data."""
        is_data = any(not name.startswith(("_", ".")) for name in self._folder.names())
        is_begun = any(self._journals())  # the new files may not be in place
        if is_data and not is_begun and self._schema() is None:
            raise OptionError(f"{self.path} exists and has no features: choose another DEST")

    def check_is_features(self) -> None:
        """Raises an error if the table contains no features that this version can read."""
        there = self._schema()
        if there is not None:
            _provenance(there)

    def check(self, spec: FeatureSpec, columns: Sequence[str], kept: StructType) -> None:
        """Raises an error if the table has another fingerprint, or other columns.

        ``kept`` has the types of those columns that imagevec does not define.
        """
        there = self._schema()
        if there is not None:
            check_fits(self.path, there, _provenance(there), spec, columns, kept)

    def known(self, retried: Sequence[str] = (), by_box: bool = False) -> DataFrame | None:
        schema = StructType([*_KNOWN, _BOX_COUNT] if by_box else _KNOWN)
        files = self.files()
        tables = [read_files(self._spark, self._folder, files, schema)] if files else []
        return known_keys(tables, retried, by_box)

    def keys_among(self, parts: list[Part], run: str) -> set[str]:
        published = self.known()
        if published is None:
            return set()
        names = [part.name for part in parts]
        paths = read_files(self._spark, self.run_folder(run), names, _PATHS)
        return {row.path for row in paths.join(published, "path", "left_semi").collect()}

    def publish(self, parts: list[Part], run: str) -> None:
        is_adopted = any(part.is_changed and part.run != run for part in parts)
        there = {*self.files()} if is_adopted else set()
        for part in parts:
            if part.is_changed and f"{_PLACES[part.kind]}{part.published_name}" in there:
                self.work.delete(f"runs/{run}/{part.name}")  # a copy of what was completed
                continue
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
            rows = self._spark.createDataFrame([(path,) for path in outdated], _PATHS)
            changed = rows if changed is None else changed.union(rows)
        if changed is not None:
            old, staged = self._stage_without(changed.distinct(), run)
            journal = _Journal(run, old, [*staged, *self._changed_files(run)])
            self._replace(journal, run, check)

    def _changed(self, run: str) -> Folder:
        return self.work.sub(f"changed/{run}")

    def _changed_paths(self, run: str) -> DataFrame | None:
        folder = self._changed(run)
        files = [f"{kind}/{name}" for kind in _PLACES for name in folder.names(kind)]
        return read_files(self._spark, folder, files, _PATHS).select("path") if files else None

    def _changed_files(self, run: str) -> list[str]:
        """Returns the changed files of a run, as their names in the table."""
        folder = self._changed(run)
        return [f"{place}{name}" for kind, place in _PLACES.items() for name in folder.names(kind)]

    def recover(self, fence: Fencing, run: str) -> None:
        self._end_replacements(fence, run)
        dead = [f"{folder}/{name}" for folder in _OF_RUNS for name in self._runs(folder)]
        fence.end_earlier()
        for folder in dead:
            self._take_over(folder, run)
        Publisher(self, fence, run).adopt()
        self.finish(run, (), fence.check)
        for folder in dict.fromkeys([*dead, *(f"{folder}/{run}" for folder in _OF_RUNS)]):
            self.work.delete(folder)
        for folder in _OF_RUNS:
            self.work.delete_empty(folder)

    def _take_over(self, folder: str, run: str) -> None:
        """Moves the parts of a dead run to the folder of another run, as if not yet published."""
        kind, _, dead = folder.partition("/")
        if kind == "runs" and dead != run:
            for name in self.work.names(folder, only_files=True):
                self.work.move(f"{folder}/{name}", f"runs/{run}/{name}")
        if kind == "changed":
            for kind in _PLACES:
                for name in self.work.names(f"{folder}/{kind}", only_files=True):
                    target = f"runs/{run}/changed-{kind}.{name}"
                    self.work.move(f"{folder}/{kind}/{name}", target)

    def _runs(self, folder: str) -> list[str]:
        return [name for name in self.work.names(folder) if RUN_ID.fullmatch(name)]

    def replacement(self) -> FolderTable:
        """Returns the table that replaces this one at the end of a run."""
        return FolderTable(self._spark, self.work.sub(_REPLACEMENT), self._fenced_by)

    def replace_by_replacement(self, run: str, check: Callable[[], None]) -> None:
        """Replaces all rows by those of ``replacement``."""
        new = self.replacement().files()
        self._replace(_Journal(_REPLACEMENT, self.files(), new), run, check)

    def clear(self) -> None:
        """Deletes the folder."""
        self._folder.delete("")

    def remove_work(self, run: str) -> None:
        for folder in _OF_RUNS:
            self.work.delete(f"{folder}/{run}")
            self.work.delete_empty(folder)
        self.work.delete(_REPLACEMENT)

    def files(self) -> list[str]:
        """Returns the files of the table, relative to it."""
        places = _PLACES.values()
        return [f"{place}{name}" for place in places for name in self._parquet_files(place)]

    def _stage_without(self, paths: DataFrame, run: str) -> tuple[list[str], list[str]]:
        """Writes the files with rows of some paths again, without these rows, as staged files.

        Returns:
            The files to replace, and the staged ones, as their names in the table.
        """
        old, new = [], []
        for kind, place in _PLACES.items():
            files = self._parquet_files(place)
            if files:
                folder = self._folder.sub(place)
                rows = read_files(self._spark, folder, files, _PATHS)
                outdated = rows.join(paths, "path", "left_semi")
                names = rewrite_files(outdated, folder, self.work.sub(f"staged/{run}/{kind}"))
                old += [f"{place}{name}" for name in names]
                new += [f"{place}{name}" for name in names.values() if name is not None]
        return old, new

    def _replace(self, journal: _Journal, run: str, check: Callable[[], None]) -> None:
        """Replaces files of the table, in the name of a run."""
        self._write(journal, run)
        check()
        if not self._complete(journal):
            raise self._taken_over()
        self.work.delete(_journal_file(run))

    def _write(self, journal: _Journal, run: str) -> None:
        self.work.write(_journal_file(run), json.dumps(journal._asdict()).encode())

    def _end_replacements(self, fence: Fencing, run: str) -> None:
        """Completes the replacements of dead runs, in the name of a run: its epoch remains."""
        begun: list[_Journal] = []
        journals = self._journals()
        for dead in journals:
            # Looked up after the journal was seen: a later run may have begun to replace files.
            is_valid = dead in runs_with_epochs(self._fenced_by)
            journal = self._read_journal(dead) if is_valid else None
            if journal is not None:
                own = run if journal.source != _REPLACEMENT else _REPLACEMENT
                begun.append(journal._replace(source=own))
                self._write(begun[-1], run)
                fence.check()
                self._take(journal, own)
        for journal in begun:
            self._complete(journal)
        for dead in sorted({*journals, run}):
            self.work.delete(_journal_file(dead))

    def _take(self, journal: _Journal, run: str) -> None:
        """Moves the new files of a dead run to another run's folders: others cannot find them."""
        for file, source in self._sources(journal.source).items():
            if file in journal.new and journal.source != run:
                self._folder.move(source, source.replace(f"/{journal.source}/", f"/{run}/"))

    def _journals(self) -> list[str]:
        """Returns the IDs of the runs that have begun to replace files."""
        matches = map(_JOURNAL.fullmatch, self.work.names())
        return [match[1] for match in matches if match is not None]

    def _read_journal(self, run: str) -> _Journal | None:
        try:
            fields = json.loads(self.work.read(_journal_file(run)) or b"")
        except ValueError:
            return None  # it was interrupted before it deleted a file
        try:
            journal = _Journal(**fields)
            is_known = journal.source == _REPLACEMENT or RUN_ID.fullmatch(journal.source)
            files = (*journal.old, *journal.new)
            is_own = is_known and all(_FILE.fullmatch(file) for file in files)
        except TypeError:
            is_own = None
        if not is_own:
            raise ImageVecError(
                f"{self.work.path}/{_journal_file(run)} names what is not a file of this table: "
                "nothing was deleted. If no run of extract wrote it, delete it"
            )
        return journal

    def _complete(self, journal: _Journal) -> bool:
        """Replaces files. Returns ``False`` if new files are gone: another run has taken them."""
        sources = self._sources(journal.source)
        if not {*journal.new} <= {*sources, *self.files()}:
            return False
        for file in journal.old:
            self._folder.delete(file)
        for file in journal.new:
            # If it has no source, it was moved before.
            if file in sources and not self._folder.move(sources[file], file):
                raise self._taken_over()
        self._folder.delete_empty(_PLACES[ERRORS])
        return True

    def _taken_over(self) -> ImageVecError:
        return ImageVecError(f"another run took over {self.path}: this one stops")

    def _sources(self, run: str) -> dict[str, str]:
        """Returns where the files are that a run puts in the table, by their names there."""
        places = [
            (place, f"{folder}/{run}/{kind}")
            for kind, place in _PLACES.items()
            for folder in ("staged", "changed")
        ]
        if run == _REPLACEMENT:
            places = [(place, f"{_REPLACEMENT}/{place}") for place in _PLACES.values()]
        return {
            f"{place}{name}": f"{WORK}/{folder.rstrip('/')}/{name}"
            for place, folder in places
            for name in self._parquet_files(f"{WORK}/{folder}")
        }

    def _schema(self) -> StructType | None:
        """Returns the columns of the table; ``None`` if it is empty."""
        files = self.files()
        return schema_of(self._folder, files[0]) if files else None

    def _parquet_files(self, folder: str) -> list[str]:
        names = self._folder.names(folder, only_files=True)
        return [name for name in names if _FILE.fullmatch(name)]


def _provenance(schema: StructType) -> Provenance:
    name = existing_column(schema.names, "features")
    return Provenance.of_metadata(schema[name].metadata, f"column {name!r}")
