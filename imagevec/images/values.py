"""The rows of an Arrow batch to decoded images: bytes, paths, Spark's image and file structs."""

from __future__ import annotations

import os
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pyarrow import fs

from imagevec.errors import ImageError, OptionError
from imagevec.images.decode import DecodedImage, check_size, decode
from imagevec.spec import ExecutionOptions

IMAGE_FIELDS = ("height", "width", "nChannels", "mode", "data")

# OpenCV's type numbers, of pyspark.ml.image.ImageSchema.ocvTypes: channels of 8 unsigned bits.
_CHANNELS_OF_MODE = {0: 1, 16: 3, 24: 4}


class ImageStruct(NamedTuple):
    """A row of Spark's ``image`` struct: raw pixels, row by row, grey, BGR or BGRA."""

    height: int
    width: int
    n_channels: int
    mode: int
    data: bytes


Value = bytes | str | ImageStruct | ImageError | None

_READ_THREADS = 8
_MAX_READ_AHEAD = 16  # files that are held in memory before their turn


def values_of(batch: pd.Series | pd.DataFrame) -> Iterator[Value]:
    """The values of one Arrow batch, as Spark hands it to a pandas UDF.

    Raises:
        OptionError: The column's type is none that is accepted.
    """
    if isinstance(batch, pd.Series):
        yield from batch
    elif set(IMAGE_FIELDS) <= set(batch.columns):
        for row in zip(*(batch[field] for field in IMAGE_FIELDS), strict=True):
            yield None if row[-1] is None else ImageStruct(*row)
    elif "content" in batch.columns:
        yield from batch["content"]
    else:
        raise OptionError(f"the input is a struct of {', '.join(batch.columns)}: {ACCEPTED}")


ACCEPTED = (
    "use a column of type binary (an image file's bytes) or string (a path or URI), "
    "Spark's image struct, or a row struct of the binaryFile source"
)


def read_ahead(values: Iterable[Value], allowed_roots: Sequence[str] = ()) -> Iterator[Value]:
    """The values in order, with paths replaced by what is read there, or by why it cannot be.

    A few files are read at a time, in threads, so that slow storage overlaps decoding and the
    forward pass. ``allowed_roots`` is the one of ``read``.
    """
    with ThreadPoolExecutor(_READ_THREADS) as pool:  # starts no thread where there is no path
        pending: deque[Future[Value]] = deque()
        for value in values:
            if not pending and not isinstance(value, str):
                yield value
                continue
            pending.append(pool.submit(_read_or_error, value, allowed_roots))
            if len(pending) > _MAX_READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_or_error(value: Value, allowed_roots: Sequence[str]) -> Value:
    try:
        return read(value, allowed_roots) if isinstance(value, str) else value
    except ImageError as error:
        return error


def load(value: Value, options: ExecutionOptions, min_side: int | None = None) -> DecodedImage:
    """Decodes one value that is not null, after ``read_ahead``.

    ``min_side`` is the one of ``imagevec.images.decode.decode``.

    Raises:
        ImageError: The value is no image that is accepted.
        OptionError: The value is of a type that is not accepted.
    """
    if isinstance(value, ImageError):
        raise value
    if isinstance(value, ImageStruct):
        return _from_struct(value, options.max_pixels)
    if not isinstance(value, bytes | bytearray):
        raise OptionError(f"the input column holds {type(value).__name__} values: {ACCEPTED}")
    return decode(
        bytes(value), max_pixels=options.max_pixels, formats=options.formats, min_side=min_side
    )


def read(path: str, allowed_roots: Sequence[str] = ()) -> bytes:
    """The bytes of a file: a local path, or a URI that ``pyarrow.fs`` knows (s3, gs, hdfs, file).

    Args:
        path: Relative local paths are of the worker's folder.
        allowed_roots: Folders, or prefixes of URIs (``"s3://bucket/photos"``, ``"s3://"``), outside
            of which nothing is read; any file may be, if there are none. Symbolic links and ``..``
            are followed before the question is asked.

    Raises:
        ImageError: ``unreadable_path`` or ``forbidden_path``.
    """
    scheme, colon, rest = path.partition(":")
    try:
        if not colon or scheme == "file":
            return _read_local(rest if colon else path, allowed_roots)
        uri = urllib.parse.quote(path, safe="/:%@?=&+,;~")  # Spark's paths hold spaces as they are
        if allowed_roots and not (_is_under(uri, allowed_roots) and ".." not in uri.split("/")):
            raise ImageError("forbidden_path", f"{path} is under none of allowed_roots")
        filesystem, path_in_it = fs.FileSystem.from_uri(uri)
        with filesystem.open_input_stream(path_in_it) as stream:
            data: bytes = stream.read()
            return data
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ImageError("unreadable_path", f"{path}: {error}") from error


def _read_local(path: str, allowed_roots: Sequence[str]) -> bytes:
    path = "/" + path.lstrip("/") if path.startswith("/") else path  # file:/a and file:///a
    if not os.path.exists(path):
        path = urllib.parse.unquote(path)  # the file_path of Spark's _metadata is quoted
    real = os.path.realpath(path)
    local_roots = [
        os.path.realpath("/" + root.removeprefix("file:").lstrip("/"))
        if root.startswith(("file:", "/"))
        else root
        for root in allowed_roots
    ]
    if allowed_roots and not _is_under(real, local_roots):
        raise ImageError("forbidden_path", f"{path} is under none of allowed_roots")
    if os.path.exists(real) and not os.path.isfile(real):  # a pipe or a device would not end
        raise ImageError("unreadable_path", f"{path}: not a file")
    return Path(real).read_bytes()


def _is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _from_struct(image: ImageStruct, max_pixels: int) -> DecodedImage:
    check_size(image.width, image.height, max_pixels)
    channels = _CHANNELS_OF_MODE.get(image.mode)
    shape = (image.height, image.width, image.n_channels)
    if channels != image.n_channels:
        raise ImageError(
            "unsupported_format", f"mode {image.mode} with {image.n_channels} channels"
        )
    if len(image.data) != np.prod(shape):
        raise ImageError("corrupt", f"{len(image.data)} bytes of pixels for {shape}")
    pixels = torch.from_numpy(np.frombuffer(image.data, np.uint8).reshape(shape).copy())
    pixels = pixels.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    rgb = pixels.expand(3, -1, -1) if channels == 1 else pixels[[2, 1, 0]]  # BGR(A) -> RGB
    return DecodedImage(rgb, image.width, image.height)
