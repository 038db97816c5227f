"""One value of the input column to what the forward pass needs of it: pixels, or a reason."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from imagevec.errors import ImageError
from imagevec.images.preprocess import resize_and_crop
from imagevec.images.values import Value, load
from imagevec.spec import ExecutionOptions, Preprocessing


class Row(NamedTuple):
    """What became of one input row before the forward pass.

    Attributes:
        image: uint8 ``(3, S, S)``; ``None`` for a null or a bad image.
        width: Of the image as displayed, in pixels.
        height: Of the image as displayed, in pixels.
        error: Why there is no image; ``None`` for a null.
        decode_seconds: Spent on its pixels.
        preprocess_seconds: Spent on its resize and crop.
    """

    image: torch.Tensor | None = None
    width: int | None = None
    height: int | None = None
    error: ImageError | None = None
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0


def prepare(value: Value, preprocessing: Preprocessing, options: ExecutionOptions) -> Row:
    """Decodes, resizes and crops one value; a bad image becomes a row with its error."""
    if value is None:
        return Row()
    start = time.perf_counter()
    try:
        decoded = load(value, options, preprocessing.min_decoded_side)
    except ImageError as error:
        if options.on_error == "raise":
            raise
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
