"""Decodes plain JPEGs."""

from __future__ import annotations

import simplejpeg
from PIL import Image

from imagevec.images.pixels import Pixels


def decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Returns uint8 RGB ``(H, W, 3)`` faster than Pillow, or ``None`` to leave errors to Pillow.

    Both use libjpeg-turbo with the same settings, so the pixels are equal at every scale. The
    default ``strict`` mode rejects every file with a libjpeg warning, and Pillow then decides.
    """
    width, height = image.size  # after ``draft``, of the scaled image
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError as error:
        if "Insufficient memory" in str(error):  # libjpeg's words
            raise MemoryError(str(error)) from error
        return None
    return pixels
