"""The values of an Arrow batch: bytes, paths, Spark's image and file structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from imagevec.errors import ImageError, OptionError

IMAGE_FIELDS = ("height", "width", "nChannels", "mode", "data")
FILE_FIELDS = ("bytes", "content")  # one of them marks a struct that contains a file

ACCEPTED = (
    "use a column of type binary (an image file's bytes) or string (a path or URI), "
    "Spark's image struct, a row struct of the binaryFile source, or a struct of bytes and path"
)


class ImageStruct(NamedTuple):
    """A row of Spark's ``image`` struct: raw pixels in row order, grey, BGR or BGRA."""

    height: int
    width: int
    n_channels: int
    mode: int
    data: bytes


class Value(NamedTuple):
    """A row of the input column.

    Attributes:
        data: The bytes of a file, the path or URI of a file, raw pixels, an error if the file could
            not be read, or ``None`` for a null. Columns of other types have other values.
        path: The path of the image, if the row contains it.
    """

    data: bytes | str | ImageStruct | ImageError | None
    path: str | None = None


def values_of(batch: pd.Series | pd.DataFrame) -> Iterator[Value]:
    """Yields the values of an Arrow batch, as Spark passes it to a pandas UDF.

    Raises:
        OptionError: The type of the column is not accepted.
    """
    if isinstance(batch, pd.Series):
        for data in batch:
            yield Value(data, data if isinstance(data, str) else None)
    elif set(IMAGE_FIELDS) <= set(batch.columns):
        structs = zip(*(batch[field] for field in IMAGE_FIELDS), strict=True)
        for struct, path in zip(structs, _paths(batch, "origin"), strict=True):
            yield Value(None if struct[-1] is None else ImageStruct(*struct), path)
    elif "bytes" in batch.columns:  # as in Hugging Face's Parquet files
        for data, path in zip(batch["bytes"], _paths(batch, "path"), strict=True):
            yield Value(path if data is None else data, path)
    elif "content" in batch.columns:
        for data, path in zip(batch["content"], _paths(batch, "path"), strict=True):
            yield Value(data, path)
    else:
        raise OptionError(f"the input is a struct of {', '.join(batch.columns)}: {ACCEPTED}")


def _paths(batch: pd.DataFrame, column: str) -> pd.Series:
    return batch[column] if column in batch.columns else pd.Series([None] * len(batch))
