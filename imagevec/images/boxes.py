"""Boxes in images: reads their column, and crops them as Pillow does.

A box is in pixels of the image as displayed. Its edges are rounded to whole pixels as by
``PIL.Image.Image.crop``: a half to even. A box that overhangs the image is clipped to it.
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pandas as pd

from imagevec.errors import ImageError, OptionError
from imagevec.images.decode import Pixels
from imagevec.images.prepare import Row
from imagevec.images.preprocess import resize_and_crop
from imagevec.images.values import Box, Value, values_of
from imagevec.spec import Preprocessing

MAX_BOXES = 10_000
"""The maximum number of boxes in an image."""

ACCEPTED_BOXES = (
    f"boxes must be of type array<struct<{','.join(Box._fields)}>> with numbers as fields, "
    "in pixels"
)


def values_with_boxes(batch: tuple[pd.Series | pd.DataFrame, pd.Series]) -> Iterator[Value]:
    """Yields the values of an Arrow batch of two columns, images and boxes.

    A null in either column is a null. An image with too many boxes becomes an error, so that it is
    not read.

    Raises:
        OptionError: There are other columns, or the type of one is not accepted.
    """
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise OptionError("a function with the option boxes takes two columns: images and boxes")
    images, boxes = batch
    if not isinstance(boxes, pd.Series):
        raise OptionError(f"the boxes are a struct of {', '.join(boxes.columns)}: {ACCEPTED_BOXES}")
    for value, items in zip(values_of(images), boxes, strict=True):
        if not (items is None or isinstance(items, list | np.ndarray)):
            raise OptionError(f"the boxes are {type(items).__name__} values: {ACCEPTED_BOXES}")
        if items is None or value.data is None:
            yield Value(None, boxes=())
        elif len(items) > MAX_BOXES:
            detail = f"{len(items):,} boxes, of which an image can have {MAX_BOXES:,}"
            yield value._replace(data=ImageError("bad_box", detail), boxes=())
        else:
            yield value._replace(boxes=tuple(map(_box, items)))


def _box(item: object) -> Box | None:
    """Reads a dictionary or a row of Spark. Other fields are ignored."""
    if item is None:
        return None
    try:
        fields = [item[name] for name in Box._fields]  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        raise OptionError(f"a box is {item!r:.200}: {ACCEPTED_BOXES}") from None
    return Box(*map(_number, fields))


def _number(field: object) -> float | None:
    if field is None:
        return None
    if not isinstance(field, numbers.Real | Decimal) or isinstance(field, bool):
        raise OptionError(f"a box has the field {field!r:.200}: {ACCEPTED_BOXES}")
    return float(field)


def crop(box: Box | None, pixels: Pixels, preprocessing: Preprocessing) -> Row:
    """Prepares a box of an image for the forward pass, like an image of its own.

    Args:
        box: The box. A bad one becomes a row with an error.
        pixels: The pixels of the image as displayed, uint8 ``(H, W, 3)``.
        preprocessing: The steps after the crop.
    """
    start = time.perf_counter()
    try:
        left, top, right, bottom = edges(box, pixels.shape[1], pixels.shape[0])
    except ImageError as error:
        # The traceback would keep the image in memory.
        return Row(error=error.with_traceback(None))
    image = resize_and_crop(pixels[top:bottom, left:right], preprocessing)
    return Row(image, preprocess_seconds=time.perf_counter() - start)


def edges(box: Box | None, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns the left, top, right and bottom edge of a box within an image, in whole pixels.

    Args:
        box: The box.
        width: The width of the image.
        height: The height of the image.

    Raises:
        ImageError: ``bad_box``: the box is null, not finite, empty or outside the image.
    """
    if box is None:
        raise ImageError("bad_box", "null")
    given = ", ".join(f"{name} {field}" for name, field in box._asdict().items())
    fields = [field for field in box if field is not None]
    if len(fields) < len(box):
        raise ImageError("bad_box", f"a null in {given}")
    x, y, box_width, box_height = fields
    sides = (x, y, x + box_width, y + box_height)
    if not all(map(math.isfinite, (*fields, *sides))):
        raise ImageError("bad_box", f"not finite: {given}")
    left, top, right, bottom = map(round, sides)
    if not (box_width > 0 and box_height > 0 and left < right and top < bottom):
        raise ImageError("bad_box", f"empty: {given}")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if not (left < right and top < bottom):
        raise ImageError("bad_box", f"outside the image of {width}x{height} pixels: {given}")
    return left, top, right, bottom
