"""Reads samples of more than 8 bits at full depth, for which Pillow has no mode in colours."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagevec.errors import ImageError
from imagevec.images.ranges import Layout
from imagevec.images.tiff import is_planar

Plane = npt.NDArray[Any]

# Raw modes of Pillow that return the high byte of 16 bits, with those that return the low byte.
_SWAPPED = "B" if sys.byteorder == "little" else "L"
_LOW_BYTES = {
    raw_mode + order: raw_mode + other
    for raw_mode in ("RGB;16", "RGBX;16", "RGBA;16")
    for order, other in (("L", "B"), ("B", "L"), ("N", _SWAPPED))
} | {"LA;16B": "RGBA"}
_IS_GREY = "grey with alpha"


def read_planes(image: Any, layout: Layout, low: Image.Image | None) -> list[Plane]:
    """Returns the samples of each channel at full depth, ``(H, W)``; alpha is the last of 2 or 4.

    Args:
        image: The image, loaded or not.
        layout: From ``layout_of``.
        low: From ``open_low_bytes``.

    Raises:
        ImageError: ``unsupported_format``: Pillow reads only the high bits of this layout.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16, copy=False)
        return [_as_stored(grey, layout) if image.format == "JPEG2000" else grey]
    if image.mode in ("I", "F") or (image.mode == "L" and layout.kind == "signed"):
        is_wide = layout.kind == "unsigned" and layout.bits == 32
        kind = np.uint32 if is_wide else np.int8 if image.mode == "L" else None
        return [np.asarray(image) if kind is None else np.asarray(image).view(kind)]
    if low is None:
        raise ImageError(
            "unsupported_format",
            f"{layout.words}: only the high 8 bits are read, so that no value range can apply",
        )
    pairs = [((image, band), (low, band)) for band in image.getbands()]
    if low.info.get(_IS_GREY):
        pairs = [((low, "R"), (low, "G")), ((low, "B"), (low, "A"))]
    return [_bytes_of(*high).astype(np.uint16) << 8 | _bytes_of(*rest) for high, rest in pairs]


def _bytes_of(image: Image.Image, band: str) -> npt.NDArray[np.uint8]:
    return np.asarray(image.getchannel(band))


def open_low_bytes(image: Any) -> Image.Image | None:
    """Opens an image of several channels of 16 bits again, to read their low bytes.

    Pillow has no mode for them and keeps the high bytes. Read in the other byte order, it keeps the
    low ones; grey with alpha is read as the four channels high, low, high and low.

    Returns:
        ``None`` for other images. The pixels are not loaded.
    """
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    if raw_mode not in _LOW_BYTES or (image.format == "TIFF" and is_planar(image)):
        return None
    low: Any = Image.open(io.BytesIO(image.fp.getvalue()), formats=[image.format])
    other = _LOW_BYTES[raw_mode]
    low.info[_IS_GREY] = other == "RGBA"
    low.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        for tile in low.tile
    ]
    return low  # type: ignore[no-any-return]


def _as_stored(grey: npt.NDArray[np.uint16], layout: Layout) -> Plane:
    """Undoes what Pillow does to JPEG 2000: samples fill the high bits, and signed ones are shifted
    up by half their range."""
    stored = grey >> (16 - layout.bits)
    return stored if layout.kind == "unsigned" else stored - np.int32(1 << (layout.bits - 1))
