"""The values of an Arrow batch: bytes, paths, Spark's image and file structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from imagevec.errors import ImageError, OptionError

IMAGE_FIELDS = ("height", "width", "nChannels", "mode", "data")
FILE_FIELDS = ("bytes", "content", "data")  # a binary one marks a struct that contains a file

ACCEPTED = (
    "use a column of type binary (an image file's bytes) or string (a path or URI), "
    "Spark's image struct, or a struct with a binary field bytes, content or data, such as a row "
    "of the binaryFile source"
)
EXPLODE = "use pyspark.sql.functions.explode first, which makes a row of each image"


class ImageStruct(NamedTuple):
    """A row of Spark's ``image`` struct: raw pixels in row order, grey, BGR or BGRA."""

    height: int
    width: int
    n_channels: int
    mode: int
    data: bytes


class Box(NamedTuple):
    """A box in an image, in pixels of the image as displayed. Fields may be null."""

    left: float | None
    top: float | None
    width: float | None
    height: float | None


class Value(NamedTuple):
    """A row of the input column.

    Attributes:
        data: The bytes of a file, the path or URI of a file, raw pixels, an error if the file could
            not be read, or ``None`` for a null. Columns of other types have other values.
        path: The path of the image, if the row contains it.
        boxes: The boxes of the image, some of which may be null; ``None`` without such a column.
    """

    data: bytes | str | ImageStruct | ImageError | None
    path: str | None = None
    boxes: tuple[Box | None, ...] | None = None


def values_of(batch: pd.Series | pd.DataFrame) -> Iterator[Value]:
    """Yields the values of an Arrow batch, as Spark passes it to a pandas UDF.

    Raises:
        OptionError: The type of the column is not accepted.
    """
    if isinstance(batch, tuple):
        raise OptionError(
            f"the function takes one column, and was given {len(batch)}: for boxes, set boxes=..."
        )
    if isinstance(batch, pd.Series):
        for data in batch:
            if isinstance(data, list | np.ndarray):
                raise OptionError(f"the input is an array: {EXPLODE}")
            yield Value(data, data if isinstance(data, str) else None)
    elif set(IMAGE_FIELDS) <= set(batch.columns):
        structs = zip(*(batch[field] for field in IMAGE_FIELDS), strict=True)
        for struct, path in zip(structs, _paths(batch, "origin"), strict=True):
            yield Value(None if struct[-1] is None else ImageStruct(*struct), path)
    elif columns := [batch[name] for name in FILE_FIELDS if _is_binary(batch, name)]:
        has_path = "bytes" in batch.columns  # as in Hugging Face's Parquet files
        for *files, path in zip(*columns, _paths(batch, "path"), strict=True):
            data = next((file for file in files if isinstance(file, bytes)), None)
            yield Value(path if data is None and has_path else data, path)
    else:
        raise OptionError(f"the input is a struct of {', '.join(batch.columns)}: {ACCEPTED}")


def _is_binary(batch: pd.DataFrame, name: str) -> bool:
    """Returns whether a field may be binary: whether all its values are bytes or null."""
    return name in batch.columns and all(map(_is_bytes_or_null, batch[name]))


def _is_bytes_or_null(value: object) -> bool:
    return value is None or isinstance(value, bytes)


def _paths(batch: pd.DataFrame, column: str) -> pd.Series:
    return batch[column] if column in batch.columns else pd.Series([None] * len(batch))
