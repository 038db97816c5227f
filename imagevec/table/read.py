"""The table that ``imagevec extract`` writes: image paths and feature vectors, as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset

from imagevec.errors import OptionError

_HINT = "give the folder that `imagevec extract` wrote"


def read_features(folder: str | Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    """The paths of all images that have features, and these features.

    Args:
        folder: A Parquet folder, or its URI, with the columns ``path`` (string) and ``features``
            (``array<float>``). Files whose names start with ``_`` or ``.`` are not data.

    Returns:
        N paths or URIs as they stand in the table, and float32 ``(N, D)``. N is at least 1.

    Raises:
        OptionError: There is no such table, no row has features, or their lengths differ.
    """
    paths: list[str] = []
    values: list[npt.NDArray[np.float32]] = []
    lengths: set[int] = set()
    try:
        for batch in _open(str(folder)).to_batches(columns=["path", "features"]):
            rows = batch.filter(pc.is_valid(batch.column("features")))
            features = rows.column("features")
            paths += rows.column("path").to_pylist()
            lengths.update(pc.unique(pc.list_value_length(features)).to_pylist())
            values.append(_floats(features.flatten()))
    except FileNotFoundError as error:
        raise OptionError(f"{folder} is not there: {_HINT}") from error
    except (OSError, pa.ArrowException) as error:
        raise OptionError(f"{folder} cannot be read as Parquet: {_HINT} ({error})") from error
    if not paths:
        raise OptionError(f"{folder} holds no features: no row has any")
    if len(lengths) > 1:
        raise OptionError(f"{folder} holds vectors of {sorted(lengths)} features: use one model")
    return paths, np.concatenate(values).reshape(len(paths), lengths.pop())


def _open(folder: str) -> Any:
    table = dataset.dataset(folder, format="parquet", ignore_prefixes=[".", "_"])
    if not table.files:
        raise OptionError(f"{folder} holds no Parquet files: {_HINT}")
    types = dict(zip(table.schema.names, table.schema.types, strict=True))
    for column in ("path", "features"):
        if column not in types:
            raise OptionError(f"{folder} has no column {column!r}, only {list(types)}: {_HINT}")
    if not _is_list_of_floats(types["features"]):
        raise OptionError(
            f"the column 'features' of {folder} is of type {types['features']}, "
            f"not list<float>: {_HINT}"
        )
    return table


def _is_list_of_floats(type: Any) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(type) for is_kind in kinds) and pa.types.is_floating(type.value_type)


def _floats(values: Any) -> npt.NDArray[np.float32]:
    """An Arrow array of numbers as NumPy's; a null among them is NaN."""
    array: npt.NDArray[np.float32] = values.to_numpy(zero_copy_only=False)
    return array.astype(np.float32, copy=False)
