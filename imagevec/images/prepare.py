"""One value of the input column to what the forward pass needs of it: pixels, or a reason."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imagevec.errors import ImageError, OptionError
from imagevec.images.decode import DecodedImage, check_size, decode
from imagevec.images.preprocess import resize_and_crop
from imagevec.images.values import ACCEPTED, ImageStruct, Value
from imagevec.spec import ExecutionOptions, Preprocessing

# OpenCV's type numbers, of pyspark.ml.image.ImageSchema.ocvTypes: channels of 8 unsigned bits.
_CHANNELS_OF_MODE = {0: 1, 16: 3, 24: 4}


class Row(NamedTuple):
    """What became of one input row before the forward pass.

    Attributes:
        input: What the forward pass takes: pixels, uint8 ``(S, S, 3)``, or the tokens of a text,
            int32 ``(L,)``; ``None`` for a null or a bad image.
        width: Of the image as displayed, in pixels.
        height: Of the image as displayed, in pixels.
        error: Why there is no input; ``None`` for a null.
        path: Where a bad image is from, if the input says so.
        decode_seconds: Spent on its pixels.
        preprocess_seconds: Spent on its resize and crop.
    """

    input: npt.NDArray[Any] | None = None
    width: int | None = None
    height: int | None = None
    error: ImageError | None = None
    path: str | None = None
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0


def prepare(value: Value, preprocessing: Preprocessing, options: ExecutionOptions) -> Row:
    """Decodes, resizes and crops one value; a bad image becomes a row with its error.

    Raises:
        OptionError: The value is of a type that is not accepted.
    """
    if value.data is None:
        return Row()
    start = time.perf_counter()
    try:
        decoded = load(value, options, preprocessing.min_decoded_side)
    except ImageError as error:
        return Row(error=error, decode_seconds=time.perf_counter() - start)
    between = time.perf_counter()
    image = resize_and_crop(decoded.pixels, preprocessing)
    end = time.perf_counter()
    return Row(
        image,
        decoded.width,
        decoded.height,
        decode_seconds=between - start,
        preprocess_seconds=end - between,
    )


def load(value: Value, options: ExecutionOptions, min_side: int | None = None) -> DecodedImage:
    """Decodes one value that is not null, after ``read_ahead``.

    ``min_side`` is the one of ``imagevec.images.decode.decode``.

    Raises:
        ImageError: The value is no image that is accepted.
        OptionError: The value is of a type that is not accepted.
    """
    data = value.data
    if isinstance(data, ImageError):
        raise data
    if isinstance(data, ImageStruct):
        return _from_struct(data, options.max_pixels)
    if not isinstance(data, bytes | bytearray):
        raise OptionError(f"the input column holds {type(data).__name__} values: {ACCEPTED}")
    return decode(
        bytes(data), max_pixels=options.max_pixels, formats=options.formats, min_side=min_side
    )


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
    pixels = np.frombuffer(image.data, np.uint8).reshape(shape)  # (H, W, C)
    rgb = np.repeat(pixels, 3, axis=2) if channels == 1 else pixels[:, :, [2, 1, 0]]  # BGR(A)
    return DecodedImage(np.ascontiguousarray(rgb), image.width, image.height)
