"""Parts: the Parquet files that a task writes while it computes, without Spark's own writer.

A task writes a part when 45 seconds have passed since its last one, or less in the first minutes of
a job: a quarter of its time so far, but at least 5 seconds. It also writes one when its rows fill
64 MB. Vectors and errors go to separate files with the same stem. The names say which task wrote
them:

    features.part-<run>-<partition>-<attempt>-<number>.parquet
    errors.part-<run>-<partition>-<attempt>-<number>.parquet

A stem that ends in ``b`` has both files. ``changed-features`` and ``changed-errors`` replace rows
of the table. A part counts once the driver has published it: see ``imagevec.table.publish``.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from imagevec.errors import ImageVecError
from imagevec.storage.folder import Folder
from imagevec.table.schema import BOXES, CHANGED, IMAGE, SOURCE_ERROR, kept_column

FEATURES, ERRORS = "features", "errors"
_SECONDS = 45.0  # so that the next forward pass still ends within a minute
_FIRST_SECONDS = 5.0
_BYTES = 64 << 20

_NAME = re.compile(
    r"(?P<changed>changed-)?(?P<kind>features|errors)\."
    r"(?P<stem>part-(?P<run>[0-9a-f]+)-(?P<partition>\d+)-(?P<attempt>\d+)-\d+(?P<both>b?))\.parquet"
)

Extract = Callable[[Iterator[Any]], Iterator[pd.DataFrame]]
"""Computes the results, with ``output="struct"``, of the batches of a pandas UDF."""


class Part(NamedTuple):
    """A file of a part.

    Attributes:
        name: The name of the file in the folder of its run.
        kind: ``"features"`` or ``"errors"``.
        stem: The name of the part, which its two files share.
        run: The ID of the run.
        partition: The number of the task, from 0.
        attempt: The ID of the attempt to run the task.
        is_changed: Whether its rows replace rows of the table.
        has_both: Whether the part has two files.
    """

    name: str
    kind: str
    stem: str
    run: str
    partition: int
    attempt: int
    is_changed: bool
    has_both: bool

    @classmethod
    def of_name(cls, name: str) -> Part | None:
        """Returns ``None`` if no task named the file."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(
            name,
            match["kind"],
            match["stem"],
            match["run"],
            int(match["partition"]),
            int(match["attempt"]),
            bool(match["changed"]),
            bool(match["both"]),
        )

    @classmethod
    def of_published_name(cls, name: str) -> Part | None:
        """Like ``of_name``, for a file that may have its ``published_name``."""
        return cls.of_name(name) or cls.of_name(f"{FEATURES}.{name}")

    @property
    def published_name(self) -> str:
        return f"{self.stem}.parquet"


@dataclass(frozen=True)
class Task:
    """What a task needs to write parts. It is pickled into the tasks.

    Attributes:
        folder: The folder of the run.
        run: The ID of the run.
        published: Folders where the driver may have moved parts of this run.
        metadata: The metadata of the Parquet files: Spark's schema, with the provenance.
        layers: The layers of ``features``, if it is a struct.
        kept: The names of the kept columns. Their input is ``kept_column`` of their number.
        compression: The name of a codec of Parquet.
        start: When the job started, in seconds since the epoch. A driver's clock that is wrong
            only changes the size of parts.
    """

    folder: Folder
    run: str
    published: tuple[Folder, ...]
    metadata: dict[str, str]
    layers: tuple[str, ...] | None
    kept: tuple[str, ...]
    compression: str
    start: float


_OPEN = "open"
NOT_SHARED = (
    "is not visible here: use a folder that the driver and all workers share, if no other run took "
    "it over"
)


def open_run(task: Task) -> None:
    """Allows tasks to write parts. If the folder of a run is deleted, they end with an error."""
    task.folder.write(_OPEN, b"")


def _check_is_open(task: Task) -> None:
    if task.folder.read(_OPEN) is None:
        raise ImageVecError(f"{task.folder.path} {NOT_SHARED}")


def write_parts(
    batches: Iterable[pa.RecordBatch], task: Task, partition: int, attempt: int, extract: Extract
) -> int:
    """Computes one task's rows and writes them as parts. Skips keys that earlier attempts wrote.

    Args:
        batches: The Arrow batches of ``Source.rows``, with the column ``CHANGED``.
        task: What to write, and where.
        partition: The number of the task, from 0.
        attempt: A number that no other attempt of any task has.
        extract: The function that computes the vectors.

    Returns:
        The number of images of this task in parts, of this attempt or others.

    Raises:
        ImageVecError: The folder of the run is not open: see ``open_run``.
    """
    _check_is_open(task)
    done = _keys_of_others(task, partition, attempt)
    writer = _Writer(task, partition, attempt)
    images = 0

    def pending() -> Iterator[pa.RecordBatch]:
        nonlocal images
        for batch in batches:
            images += batch.num_rows
            yield _without(batch, done)

    for rows in _results(pending(), task, extract):
        writer.add(rows)
    writer.flush()
    return images


def _keys_of_others(task: Task, partition: int, attempt: int) -> set[str]:
    """Returns the keys in parts of other attempts. Announces this attempt first."""
    attempts = f"tasks/{partition}"
    task.folder.write(f"{attempts}/{attempt}", b"")
    if len(task.folder.names(attempts)) < 2:
        return set()
    # The driver moves parts in this direction.
    places = [(folder, folder.names(only_files=True)) for folder in (task.folder, *task.published)]
    stems = published_stems(name for _, names in places[1:] for name in names)
    whole = {part.stem for part in complete(places[0][1], stems)} | stems
    keys: set[str] = set()
    for folder, names in places:
        for name in names:
            part = Part.of_published_name(name)
            if part and (part.run, part.partition) == (task.run, partition) and part.stem in whole:
                keys.update(_keys_in(folder, name))
    return keys


def published_stems(names: Iterable[str]) -> set[str]:
    """Returns the stems of published files."""
    return {part.stem for part in map(Part.of_published_name, names) if part is not None}


def complete(names: Iterable[str], published: Collection[str] = ()) -> list[Part]:
    """Returns the parts of which all files are there, or one was published."""
    parts = [part for part in map(Part.of_name, names) if part is not None]
    files = Counter(part.stem for part in parts)
    return [
        part for part in parts if files[part.stem] == 1 + part.has_both or part.stem in published
    ]


def _keys_in(folder: Folder, name: str) -> list[str]:
    data = folder.read(name)
    if data is None:  # moved: it is read from a later folder
        return []
    table = parquet.read_table(pa.BufferReader(data), columns=["path"])
    keys: list[str] = table.column("path").to_pylist()
    return keys


def _without(batch: pa.RecordBatch, done: set[str]) -> pa.RecordBatch:
    if not done:
        return batch
    is_done = pc.is_in(batch.column("path"), pa.array(list(done), pa.string()))
    return batch.filter(pc.invert(is_done))


def _results(batches: Iterable[pa.RecordBatch], task: Task, extract: Extract) -> Iterator[pa.Table]:
    """Yields the rows of the result, in pieces of some images, as the forward passes end."""
    waiting: list[pa.RecordBatch] = []  # rows whose vectors are being computed, without images

    def inputs() -> Iterator[Any]:
        for batch in batches:
            names = batch.schema.names
            waiting.append(batch.select([name for name in names if name != IMAGE]))
            image = as_pandas(batch.column(IMAGE))
            yield image if BOXES not in names else (image, as_pandas(batch.column(BOXES)))

    for result in extract(inputs()):
        others = _taken(waiting, len(result))
        to_rows = _rows_of_boxes if BOXES in others.schema.names else _rows_of_images
        yield to_rows(others, result, task)


def _taken(waiting: list[pa.RecordBatch], number: int) -> pa.Table:
    """Removes the first rows from batches, and copies them: a slice would keep whole batches."""
    taken = []
    while number:
        batch = waiting[0]
        first = batch.slice(0, number)
        taken.append(pa.ipc.read_record_batch(first.serialize(), first.schema))
        waiting[0] = batch.slice(first.num_rows)
        if not waiting[0].num_rows:
            del waiting[0]
        number -= first.num_rows
    while waiting and not waiting[0].num_rows:
        del waiting[0]
    return pa.Table.from_batches(taken)


def as_pandas(column: pa.Array) -> pd.Series | pd.DataFrame:
    """Converts an Arrow column as Spark does for a pandas UDF: a struct becomes a data frame."""
    if pa.types.is_struct(column.type):
        names = [column.type.field(number).name for number in range(column.type.num_fields)]
        fields = dict(zip(names, map(_series, column.flatten()), strict=True))
        return pd.DataFrame(fields, dtype=object)
    return _series(column)


def _series(column: pa.Array) -> pd.Series:
    return pd.Series(column.to_pylist(), dtype=object)


def _rows_of_images(others: pa.Table, result: pd.DataFrame, task: Task) -> pa.Table:
    columns = {name: others.column(name) for name in _SOURCE_COLUMNS}
    columns[FEATURES] = _vectors(list(result["features"]), task.layers)
    for name in ("width", "height", "truncated"):
        columns[name] = pa.array(result[name], _TYPES[name])
    columns["error"] = pc.coalesce(others.column(SOURCE_ERROR), _texts(result["error"]))
    return _with_kept(columns, others, task)


_SOURCE_COLUMNS = ("path", "length", "modificationTime", "version")
_TYPES = {"width": pa.int32(), "height": pa.int32(), "truncated": pa.bool_()}


def _rows_of_boxes(others: pa.Table, result: pd.DataFrame, task: Task) -> pa.Table:
    """Returns a row for each box. An image without boxes, or without vectors, keeps one row."""
    errors = [[] if errors is None else errors for errors in result["box_errors"]]
    counts = np.array([len(boxes) for boxes in errors], np.int64)
    rows = np.repeat(np.arange(len(counts)), np.maximum(counts, 1))
    is_box = counts[rows] > 0
    # The position of each box in the flattened lists.
    places = pa.array(np.cumsum(is_box) - 1, mask=~is_box)
    numbers = np.arange(len(rows)) - np.searchsorted(rows, rows)

    def of_boxes(items: list[Any]) -> list[Any]:
        each = iter(items)
        return [next(each) if flag else None for flag in is_box]

    repeated = others.take(pa.array(rows))
    columns = {name: repeated.column(name) for name in _SOURCE_COLUMNS}
    columns[FEATURES] = _vectors(of_boxes(_flat_vectors(result, counts, task.layers)), task.layers)
    for name in ("width", "height", "truncated"):
        values = pa.array(result[name], _TYPES[name]).take(pa.array(rows))
        columns[name] = pc.if_else(pa.array(is_box), values, pa.scalar(None, values.type))
    own = of_boxes(list(itertools.chain.from_iterable(errors)))
    image_errors = _texts(result["error"]).take(pa.array(rows))
    columns["error"] = pc.coalesce(
        repeated.column(SOURCE_ERROR), image_errors, pa.array(own, pa.string())
    )
    lists = pa.chunked_array(others.column(BOXES)).combine_chunks()
    boxes = lists.filter(pa.array(counts > 0)).flatten()
    columns["box"] = boxes.take(places)
    columns["box_number"] = pa.array(numbers, pa.int32(), mask=~is_box)
    columns["box_count"] = pa.array(counts[rows], pa.int32(), mask=~is_box)
    return _with_kept(columns, repeated, task)


def _flat_vectors(result: pd.DataFrame, counts: Any, layers: tuple[str, ...] | None) -> list[Any]:
    """Returns the vectors of all boxes, or for each a dictionary from layer to vector."""
    flat: list[Any] = []
    for vectors, count in zip(result["features"], counts, strict=True):
        if count and layers is None:
            flat += vectors
        elif count:
            flat += [{layer: vectors[layer][n] for layer in layers or ()} for n in range(count)]
    return flat


def _with_kept(columns: dict[str, Any], others: pa.Table, task: Task) -> pa.Table:
    kept = {name: others.column(kept_column(n)) for n, name in enumerate(task.kept)}
    return pa.table({**columns, **kept, CHANGED: others.column(CHANGED)})


def _texts(column: pd.Series) -> pa.Array:
    return pa.array(list(column), pa.string())


def _vectors(vectors: list[Any], layers: tuple[str, ...] | None) -> pa.Array:
    """Returns a column of float32 lists, or of structs with such a field for each layer."""
    if layers is None:
        return _lists(vectors)
    fields = [_lists([vector and vector[layer] for vector in vectors]) for layer in layers]
    return pa.StructArray.from_arrays(fields, names=list(layers))


def _lists(vectors: list[Any]) -> pa.Array:
    is_null = np.array([vector is None for vector in vectors], bool)
    lengths = [0 if vector is None else len(vector) for vector in vectors]
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32(), mask=np.append(is_null, False))
    present = [vector for vector in vectors if vector is not None]
    values = np.concatenate(present) if present else np.empty(0)
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.float32, copy=False)))


class _Writer:
    """Collects rows, and writes a part when it is time, or when they are large."""

    def __init__(self, task: Task, partition: int, attempt: int) -> None:
        self._task = task
        self._stem = f"part-{task.run}-{partition:05}-{attempt}"
        self._number = 0
        self._rows: list[pa.Table] = []
        self._bytes = 0
        self._since = self._last = time.monotonic()

    def add(self, rows: pa.Table) -> None:
        self._rows.append(rows)
        self._bytes += rows.nbytes
        now = time.monotonic()
        next_rows = now + (now - self._last)  # they may take as long as these
        if self._bytes >= _BYTES or next_rows - self._since >= self._longest_seconds():
            self.flush()
        self._last = now

    def _longest_seconds(self) -> float:
        """Returns how long a part may take: at first less, as a run that is killed early began."""
        age = time.time() - self._task.start
        return min(_SECONDS, max(_FIRST_SECONDS, age / 4))

    def flush(self) -> None:
        if self._rows:
            rows = pa.concat_tables(self._rows)
            is_vector = pc.and_(rows.column("width").is_valid(), rows.column("error").is_null())
            for is_changed in (False, True):
                mask = pc.equal(rows.column(CHANGED), is_changed)
                kinds = {FEATURES: pc.and_(mask, is_vector), ERRORS: pc.and_not(mask, is_vector)}
                of_kinds = {kind: rows.filter(mask) for kind, mask in kinds.items()}
                self._write(
                    {kind: of_kinds[kind] for kind in kinds if len(of_kinds[kind])}, is_changed
                )
        self._rows, self._bytes, self._since = [], 0, time.monotonic()

    def _write(self, files: dict[str, pa.Table], is_changed: bool) -> None:
        if not files:
            return
        _check_is_open(self._task)
        stem = f"{self._stem}-{self._number:04}{'b' if len(files) > 1 else ''}"
        self._number += 1
        for kind, rows in files.items():
            data = to_parquet(rows.drop_columns([CHANGED]), self._task)
            prefix = "changed-" if is_changed else ""
            self._task.folder.write(f"{prefix}{kind}.{stem}.parquet", data)


def to_parquet(rows: pa.Table, task: Task) -> bytes:
    """Returns the bytes of a Parquet file with one row group, as Spark would write it."""
    rows = rows.replace_schema_metadata(task.metadata)
    sink = pa.BufferOutputStream()
    names = [name for name in rows.schema.names if name != FEATURES]  # vectors do not repeat
    parquet.write_table(
        rows,
        sink,
        row_group_size=max(1, rows.num_rows),
        compression=task.compression,
        use_dictionary=names,
        write_statistics=names,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def codec_of(file: parquet.ParquetFile) -> str:
    """Returns the codec of a Parquet file, as PyArrow names it."""
    if not file.metadata.num_row_groups:
        return "snappy"
    codec: str = file.metadata.row_group(0).column(0).compression.lower()
    return "none" if codec == "uncompressed" else codec
