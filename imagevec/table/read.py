"""Reads the Parquet tables that imagevec writes, in blocks, so that any size fits in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from imagevec.errors import OptionError
from imagevec.storage.folder import Folder
from imagevec.storage.listing import described, list_files
from imagevec.storage.location import Location
from imagevec.storage.opened import open_file
from imagevec.table.schema import check_rows_are_images

_ROWS = 2048  # per block
_BUFFER_BYTES = 4 << 20  # per file; else a whole row group is held, 128 MB by Spark's default
_FEATURES = ["path", "features"]
_GROUPS = ["path", "group"]
_EXTRACT = "give the folder that `imagevec extract` wrote"
_DUPLICATES = "give the folder that `imagevec duplicates` wrote"
_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_ICEBERG = ".metadata.json"
_SPARK_SCHEMA = b"org.apache.spark.sql.parquet.row.metadata"


class RowGroup(NamedTuple):
    """A part of a table that can be read separately.

    Attributes:
        file: The path of a Parquet file.
        number: The index of the row group in the file, from 0.
    """

    file: str
    number: int


def read_vectors(
    folder: str | Path, row_groups: Collection[RowGroup] | None = None
) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Yields the images of a table that have features, in blocks.

    Args:
        folder: A Parquet folder, or its URI, with the columns ``path`` (string) and ``features``
            (``array<float>``). Files whose names start with ``_`` or ``.`` are ignored.
        row_groups: The row groups to read; by default all.

    Yields:
        N paths or URIs as in the table, and float32 ``(N, D)``, which may be read-only. N is at
        least 1.

    Raises:
        OptionError: The table does not exist, no row has features, rows are boxes, or vectors
            differ in length.
    """
    lengths: set[int] = set()
    for _, batch in _batches(str(folder), _FEATURES, _FEATURES, _EXTRACT, row_groups):
        rows = batch.drop_null()
        if rows.num_rows == 0:
            continue
        features = rows.column("features")
        lengths.update(pc.unique(pc.list_value_length(features)).to_pylist())
        if len(lengths) > 1:
            raise OptionError(f"{folder} has vectors of {sorted(lengths)} features: use one model")
        values = _floats(features.flatten())
        yield rows.column("path").to_pylist(), values.reshape(rows.num_rows, *lengths)
    if not lengths and row_groups is None:
        raise OptionError(f"{folder} has no features: no row has a vector")


def read_paths(folder: str | Path) -> Iterator[tuple[RowGroup, list[str]]]:
    """Yields the paths of all rows of a table, with or without features, in blocks.

    Yields:
        The row group of the block, and its paths.

    Raises:
        OptionError: The table does not exist.
    """
    for row_group, batch in _batches(str(folder), _FEATURES, ["path"], _EXTRACT):
        yield row_group, batch.column("path").drop_null().to_pylist()


def read_groups(folder: str | Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yields the rows of a table of near-duplicates, in blocks.

    Args:
        folder: A Parquet folder, or its URI, with the columns ``path`` and ``group`` (strings).

    Yields:
        N paths, and for each the smallest path of its group.

    Raises:
        OptionError: The table does not exist.
    """
    for _, batch in _batches(str(folder), _GROUPS, _GROUPS, _DUPLICATES):
        rows = batch.drop_null()
        yield rows.column("path").to_pylist(), rows.column("group").to_pylist()


def column_metadata(folder: str | Path, column: str) -> dict[str, Any]:
    """Returns the metadata that Spark stored for a column of a table; empty if there is none.

    Raises:
        OptionError: The table does not exist.
    """
    with _errors_of(str(folder), _EXTRACT):
        first, *_ = _files(str(folder), _EXTRACT)
        schema = parquet.read_schema(_opened(first))
    fields = json.loads((schema.metadata or {}).get(_SPARK_SCHEMA, b'{"fields": []}'))["fields"]
    found: list[dict[str, Any]] = [x["metadata"] for x in fields if x["name"] == column]
    return found[0] if found else {}


def _batches(
    folder: str,
    expected: list[str],
    columns: list[str],
    hint: str,
    row_groups: Collection[RowGroup] | None = None,
) -> Iterator[tuple[RowGroup, Any]]:
    """Yields Arrow batches of some of the expected columns, and the row group of each."""
    with _errors_of(folder, hint):
        for path in _files(folder, hint):
            with parquet.ParquetFile(
                _opened(path), pre_buffer=False, buffer_size=_BUFFER_BYTES
            ) as file:
                _check_columns(folder, expected, file.schema_arrow, hint)
                for number in range(file.num_row_groups):
                    row_group = RowGroup(path, number)
                    if row_groups is None or row_group in row_groups:
                        for batch in file.iter_batches(_ROWS, [number], columns, use_threads=False):
                            yield row_group, batch


@contextmanager
def _errors_of(folder: str, hint: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise OptionError(f"{folder} does not exist: {hint}") from error
    except (OSError, pa.ArrowException) as error:
        raise OptionError(f"{folder} cannot be read as Parquet: {hint} ({error})") from error


def _files(folder: str, hint: str) -> list[str]:
    """Returns the paths of a folder's data files, at least one.

    ``pyarrow.dataset`` does the same, but imports pandas.
    """
    entry = described(folder)
    if entry.kind != "folder":
        return [entry.path]
    check_has_no_log(folder)
    listed = list_files(folder, recursive=True, pattern="*.parquet")
    paths = sorted(str(Location.parse(file.path)) for file in listed if file.skipped is None)
    if not paths:
        raise OptionError(f"{folder} has no Parquet files: {hint}")
    return paths


def check_has_no_log(path: str) -> None:
    """Raises ``OptionError`` for a table whose files alone do not say which rows it has."""
    folder = Folder(path)
    names = folder.names()
    kind = next((kind for name, kind in _LOGS.items() if name in names), None)
    if "metadata" in names and any(_ICEBERG in name for name in folder.names("metadata")):
        kind = "Iceberg"
    if kind is not None:
        raise OptionError(
            f"{path} is a table of {kind}, whose files also contain deleted rows: use --format "
            f"{kind.lower()}, or --format table with its name"
        )


def _opened(path: str) -> Any:
    location = Location.parse(path)
    return location.path if location.is_local else open_file(location)


def _check_columns(folder: str, columns: list[str], schema: Any, hint: str) -> None:
    check_rows_are_images(folder, schema.names)
    types = dict(zip(schema.names, schema.types, strict=True))
    for column in columns:
        if column not in types:
            raise OptionError(f"{folder} has no column {column!r}, only {list(types)}: {hint}")
        is_wanted, wanted = _is_string, "string"
        if column == "features":
            is_wanted, wanted = _is_list_of_floats, "list<float>"
        if not is_wanted(types[column]):
            raise OptionError(
                f"the column {column!r} of {folder} is of type {types[column]}, "
                f"not {wanted}: {hint}"
            )


def _is_string(type: Any) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


def _is_list_of_floats(type: Any) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(type) for is_kind in kinds) and pa.types.is_floating(type.value_type)


def _floats(values: Any) -> npt.NDArray[np.float32]:
    """Converts an Arrow array of numbers to NumPy. Nulls become NaN."""
    if values.null_count:
        values = pc.fill_null(values, math.nan)
    return np.from_dlpack(values).astype(np.float32, copy=False)  # to_numpy imports pandas
