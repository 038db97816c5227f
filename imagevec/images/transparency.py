"""Puts transparent pixels over a colour, or drops alpha."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # by the mode with premultiplied alpha
_BITS_OF_GREY = {"L;2": 2, "L;4": 4}  # by the raw mode of a PNG


def flattened(image: Image.Image, background: str | None) -> Pixels:
    """Returns the pixels over a colour, uint8 ``(H, W, 3)``.

    Transparent are: an alpha channel, the colours of a palette or the one colour that a file
    declares as transparent, and what the first frame of a GIF leaves free.

    Args:
        image: An image with 8 bits per channel. Its pixels need not be loaded.
        background: The colour, as ``"#rrggbb"``; ``None`` returns the colours that transparent
            pixels have, as ``convert("RGB")`` of Pillow and torchvision do.
    """
    if background is None:
        return _colours(image)
    frame = image.tile[0].extents if image.format == "GIF" and image.tile else None  # type: ignore[attr-defined]
    _scale_key(image)
    if frame in (None, (0, 0, *image.size)) and not image.has_transparency_data:
        return _colours(image)
    above = _straight(image)
    if above.mode != "RGBA":
        above = above.convert("RGBA")
    if image.format == "BMP" and above.getchannel("A").getextrema() == (0, 0):
        return _colours(image)  # as browsers do: many programs leave this channel empty
    if frame is not None:
        above = above.crop(frame)
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(above, frame, above)
    return np.array(canvas)


def _colours(image: Image.Image) -> Pixels:
    return np.array(image if image.mode == "RGB" else _straight(image).convert("RGB"))


def _straight(image: Image.Image) -> Image.Image:
    """Divides premultiplied colours by alpha."""
    mode = _STRAIGHT.get(image.mode)
    return image if mode is None else image.convert(mode)


def _scale_key(image: Any) -> None:
    """Scales the transparent grey of a PNG of 2 or 4 bits like its pixels, which Pillow does not.

    A key has 16 bits, of which as many count as a sample has (PNG 3rd edition, section 11.3.2.1).
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or not image.tile or image.mode not in ("L", "RGB") or key is None:
        return
    most = 2 ** _BITS_OF_GREY.get(image.tile[0].args, 8) - 1
    if image.mode == "L":
        image.info["transparency"] = (key & most) * 255 // most
    else:
        image.info["transparency"] = tuple(value & most for value in key)
