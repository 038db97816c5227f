"""Converts a value of the input column to pixels for the forward pass, or to an error."""

from __future__ import annotations

import time
import traceback
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagevec.errors import ImageError, OptionError
from imagevec.images.decode import DecodedImage, check_size, decode
from imagevec.images.formats import check_bytes
from imagevec.images.preprocess import resize_and_crop
from imagevec.images.transparency import flattened
from imagevec.images.values import ACCEPTED, Box, ImageStruct, Value
from imagevec.spec import ExecutionOptions, Preprocessing

# OpenCV type numbers from pyspark.ml.image.ImageSchema.ocvTypes, with 8-bit unsigned channels.
_CHANNELS_OF_MODE = {0: 1, 16: 3, 24: 4}


class Row(NamedTuple):
    """An input row, prepared for the forward pass.

    Attributes:
        input: The input of the forward pass: pixels, uint8 ``(H, W, 3)`` in the model's size, or
            the tokens of a text, int32 ``(L,)``; ``None`` for a null or a bad image.
        width: The width of the image as displayed, in pixels.
        height: The height of the image as displayed, in pixels.
        error: The error of a bad image; ``None`` for a null.
        path: The path of a bad image, if known.
        decode_seconds: The time spent decoding.
        preprocess_seconds: The time spent resizing and cropping, or tokenizing.
        truncated: Whether the file ends before the image does; ``None`` if it was not decoded.
        boxes: The boxes of the image, as in ``Value``; ``None`` also for a crop of one box.
    """

    input: npt.NDArray[Any] | None = None
    width: int | None = None
    height: int | None = None
    error: ImageError | None = None
    path: str | None = None
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    truncated: bool | None = None
    boxes: tuple[Box | None, ...] | None = None


def prepare(value: Value, preprocessing: Preprocessing, options: ExecutionOptions) -> Row:
    """Decodes, resizes and crops one value. A bad image becomes a row with an error.

    Raises:
        OptionError: The type of the value is not accepted.
    """
    row = decoded(value, preprocessing, options)
    if row.input is None:
        return row
    start = time.perf_counter()
    image = resize_and_crop(row.input, preprocessing)
    return row._replace(input=image, preprocess_seconds=time.perf_counter() - start)


def decoded(value: Value, preprocessing: Preprocessing, options: ExecutionOptions) -> Row:
    """Like ``prepare``, without resize and crop: the input is the whole image."""
    if value.data is None:
        return Row()
    start = time.perf_counter()
    try:
        image = load(value, options, preprocessing)
    except ImageError as error:
        _clear_frames(error)
        return Row(error=error, decode_seconds=time.perf_counter() - start)
    return Row(
        image.pixels,
        image.width,
        image.height,
        decode_seconds=time.perf_counter() - start,
        truncated=image.truncated,
    )


def _clear_frames(error: BaseException | None) -> None:
    """Frees what the frames of an error and of its causes hold: the file, the decoded image."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None  # the frame of the caller runs: it cannot be cleared
        error = error.__cause__ or error.__context__


def load(value: Value, options: ExecutionOptions, preprocessing: Preprocessing) -> DecodedImage:
    """Decodes one non-null value from ``read_ahead``.

    Raises:
        ImageError: The value is not an accepted image.
        OptionError: The type of the value is not accepted.
    """
    data = value.data
    if isinstance(data, ImageError):
        raise data
    if isinstance(data, ImageStruct):
        return _from_struct(data, options.max_pixels, preprocessing.background)
    if not isinstance(data, bytes | bytearray):
        raise OptionError(f"the input column contains {type(data).__name__} values: {ACCEPTED}")
    check_bytes(len(data), options.max_bytes)
    return decode(
        bytes(data),
        max_pixels=options.max_pixels,
        formats=options.formats,
        min_side=preprocessing.min_decoded_side,
        background=preprocessing.background,
        value_range=preprocessing.value_range,
        truncated=options.truncated,
    )


def _from_struct(image: ImageStruct, max_pixels: int, background: str | None) -> DecodedImage:
    check_size(image.width, image.height, max_pixels)
    channels = _CHANNELS_OF_MODE.get(image.mode)
    shape = (image.height, image.width, image.n_channels)
    if channels != image.n_channels:
        raise ImageError(
            "unsupported_format", f"mode {image.mode} with {image.n_channels} channels"
        )
    if len(image.data) != np.prod(shape):
        raise ImageError("corrupt", f"{len(image.data)} bytes of pixels for {shape}")
    if channels == 4 and background is not None:
        size = (image.width, image.height)
        above = Image.frombytes("RGBA", size, bytes(image.data), "raw", "BGRA")
        return DecodedImage(flattened(above, background), image.width, image.height)
    pixels = np.frombuffer(image.data, np.uint8).reshape(shape)  # (H, W, C)
    rgb = np.repeat(pixels, 3, axis=2) if channels == 1 else pixels[:, :, [2, 1, 0]]  # BGR(A)
    return DecodedImage(np.ascontiguousarray(rgb), image.width, image.height)
