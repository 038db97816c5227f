"""Publishing: the driver makes the parts of tasks visible in the table, each key once.

Two attempts of a task may write the same rows: after a failure, by speculation, or because Spark
runs a stage again. So parts are published by key. A row counts if it is the first with its key that
the driver publishes; a part with other rows is written again without them, before it is published.

The order fences runs: the driver lists parts, then checks that no later run exists, then moves what
it listed. A later run first moves the parts of dead runs into its own folder, where these cannot
find them any more, and then looks up which of their keys were published.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from imagevec.errors import ImageVecError
from imagevec.storage.folder import Folder
from imagevec.table.parts import FEATURES, Part, codec_of, complete, published_stems

NULL = "null"  # the code of a null

logger = logging.getLogger(__name__)


@dataclass
class Published:
    """What a run has published.

    Attributes:
        images: The number of images.
        features: The number of vectors.
        errors: The number of errors by code; ``NULL`` is the code of nulls.
    """

    images: int = 0
    features: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Table(Protocol):
    """What a publisher needs of a table."""

    def run_folder(self, run: str) -> Folder:
        """Returns the folder where the tasks of a run write parts."""

    def published_folders(self, run: str) -> tuple[Folder, ...]:
        """Returns the folders where published parts of a run may be."""

    def keys_among(self, parts: list[Part], run: str) -> set[str]:
        """Returns the keys in parts of dead runs, in the folder of a run, that the table has."""

    def publish(self, parts: list[Part], run: str) -> None:
        """Makes parts of a run visible, and removes them from its folder."""


class Fencing(Protocol):
    def check(self) -> None:
        """Raises ``ImageVecError`` if a later run has fenced this one."""

    def end_earlier(self) -> None:
        """Deletes the epochs of earlier runs."""


class _DamagedError(ImageVecError):
    """A part is not a complete Parquet file."""


class Publisher:
    """Publishes the parts of one run.

    Attributes:
        published: What was published so far.
    """

    def __init__(self, table: Table, fence: Fencing, run: str) -> None:
        self.published = Published()
        self._table = table
        self._fence = fence
        self._run = run
        self._folder = table.run_folder(run)
        self._keys = _Keys()

    def look(self) -> bool:
        """Publishes the parts that tasks have completed. Returns whether there were any."""
        return self._publish(complete(self._names()))

    def adopt(self) -> None:
        """Publishes the parts of dead runs, which are in the folder of this run before its job.

        Damaged parts are deleted. What tasks of dead runs still write is never published.
        """
        names = self._names()
        parts = complete(names, self._published_stems()) if names else []
        damaged = {part.stem for part in parts if not self._is_whole(part)}
        for name in sorted({*names} - {part.name for part in parts if part.stem not in damaged}):
            self._folder.delete(name)
        parts = [part for part in parts if part.stem not in damaged]
        new = [part for part in parts if not part.is_changed]
        if new:
            self._keys.add("", self._table.keys_among(new, self._run))
        self._publish(parts)

    def _published_stems(self) -> set[str]:
        folders = self._table.published_folders(self._run)
        return published_stems(name for f in folders for name in f.names(only_files=True))

    def _names(self) -> list[str]:
        return self._folder.names(only_files=True)

    def _publish(self, parts: list[Part]) -> bool:
        remaining = [part for files in _by_stem(parts) for part in self._first(files)]
        self._fence.check()
        if remaining:
            try:
                self._table.publish(remaining, self._run)
            except Exception:
                self._fence.check()  # a later run may have moved the parts
                raise
        return bool(remaining)

    def _first(self, files: list[Part]) -> list[Part]:
        """Keeps the rows of a part whose keys are new, and counts them. Returns the files left."""
        rows = {part: self._rows(part) for part in files}
        keys = {key for table in rows.values() for key in table.column("path").to_pylist()}
        old = self._keys.add("changed" if files[0].is_changed else "", keys)
        if old:
            rows = {part: self._rewritten(part, old) for part in files}
        self.published.images += len(keys) - len(old)
        for part, table in rows.items():
            self._count(part, table)
        return [part for part, table in rows.items() if len(table)]

    def _rows(self, part: Part) -> pa.Table:
        """Reads the columns of a part that the driver needs."""
        columns = ["path"] if part.kind == FEATURES else ["path", "error"]
        try:
            with self._folder.open(part.name) as file:
                return parquet.read_table(file, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            # Arrow's errors have no number, those of a disk have.
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise
            self._fence.check()  # a later run may have replaced it
            self._folder.delete(part.name)
            raise _DamagedError(
                f"{self._folder.path}/{part.name} is damaged: run extract again to compute its "
                f"images ({error})"
            ) from error

    def _is_whole(self, part: Part) -> bool:
        try:
            self._rows(part)
        except _DamagedError as error:
            logger.warning("%s", error)
            return False
        return True

    def _rewritten(self, part: Part, old: set[str]) -> pa.Table:
        with self._folder.open(part.name) as file:
            parts = parquet.ParquetFile(file)
            table, codec = parts.read(), codec_of(parts)
        is_old = pc.is_in(table.column("path"), pa.array(list(old), pa.string()))
        table = table.filter(pc.invert(is_old))
        if len(table):
            sink = pa.BufferOutputStream()
            parquet.write_table(table, sink, compression=codec)
            self._folder.write(part.name, sink.getvalue().to_pybytes())
        else:
            self._folder.delete(part.name)
        return table

    def _count(self, part: Part, rows: pa.Table) -> None:
        if part.kind == FEATURES:
            self.published.features += len(rows)
        else:
            codes = pc.fill_null(rows.column("error"), NULL).to_pylist()
            self.published.errors.update(code.partition(":")[0] for code in codes)


def _by_stem(parts: list[Part]) -> Iterator[list[Part]]:
    stems: dict[str, list[Part]] = {}
    for part in parts:
        stems.setdefault(part.stem, []).append(part)
    yield from stems.values()


class _Keys:
    """The keys that a run has published, in a temporary file of SQLite."""

    def __init__(self) -> None:
        # Of any thread: the one that watches the job, and the one that ends it.
        self._connection = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute(
            "CREATE TABLE keys (kind TEXT, key TEXT, PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )

    def add(self, kind: str, keys: set[str]) -> set[str]:
        """Adds keys. Returns those that were there before."""
        old = set()
        self._connection.execute("BEGIN")
        for key in keys:
            added = self._connection.execute(
                "INSERT OR IGNORE INTO keys VALUES (?, ?)", (kind, key)
            )
            if not added.rowcount:
                old.add(key)
        self._connection.execute("COMMIT")
        return old
