"""The values of an Arrow batch: bytes, paths, Spark's image and file structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from imagevec.errors import ImageError, OptionError

IMAGE_FIELDS = ("height", "width", "nChannels", "mode", "data")
FILE_FIELDS = ("bytes", "content")  # a struct with one of them is of files

ACCEPTED = (
    "use a column of type binary (an image file's bytes) or string (a path or URI), "
    "Spark's image struct, a row struct of the binaryFile source, or a struct of bytes and path"
)


class ImageStruct(NamedTuple):
    """A row of Spark's ``image`` struct: raw pixels, row by row, grey, BGR or BGRA."""

    height: int
    width: int
    n_channels: int
    mode: int
    data: bytes


class Value(NamedTuple):
    """A row of the input column.

    Attributes:
        data: A file's bytes, the path or URI to read them from, or raw pixels; an error where they
            could not be read; ``None`` for a null. Of another type where the column is.
        path: Where the image is from, if the row says so.
    """

    data: bytes | str | ImageStruct | ImageError | None
    path: str | None = None


def values_of(batch: pd.Series | pd.DataFrame) -> Iterator[Value]:
    """The values of one Arrow batch, as Spark hands it to a pandas UDF.

    Raises:
        OptionError: The column's type is none that is accepted.
    """
    if isinstance(batch, pd.Series):
        for data in batch:
            yield Value(data, data if isinstance(data, str) else None)
    elif set(IMAGE_FIELDS) <= set(batch.columns):
        structs = zip(*(batch[field] for field in IMAGE_FIELDS), strict=True)
        for struct, path in zip(structs, _paths(batch, "origin"), strict=True):
            yield Value(None if struct[-1] is None else ImageStruct(*struct), path)
    elif "bytes" in batch.columns:  # of Hugging Face's Parquet files
        for data, path in zip(batch["bytes"], _paths(batch, "path"), strict=True):
            yield Value(path if data is None else data, path)
    elif "content" in batch.columns:
        for data, path in zip(batch["content"], _paths(batch, "path"), strict=True):
            yield Value(data, path)
    else:
        raise OptionError(f"the input is a struct of {', '.join(batch.columns)}: {ACCEPTED}")


def _paths(batch: pd.DataFrame, column: str) -> pd.Series:
    return batch[column] if column in batch.columns else pd.Series([None] * len(batch))
