"""Second tries for damaged files: with all their pixels, or with those that are left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from imagevec.images.jpeg import up_to_cut, with_end
from imagevec.images.pixels import Pixels
from imagevec.images.png import without_ancillary_chunks

# Decoders of WebP and AVIF need the whole file, and libheif that of an image without tiles.
_DECODED_IN_PART = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "HEIF")

_ENDS_EARLY = ("truncated", "decoder error -2")  # words of Pillow; the latter of libtiff, too

_CHUNK = 1 << 16  # pixels that are compared at once


def repaired(data: bytes, name: str) -> Iterator[bytes]:
    """Yields files to try instead of one that was refused.

    Their pixels are those of the intact file, unless the decoder refuses them, too.

    Args:
        data: The whole file.
        name: The name of its format.
    """
    if name == "PNG":
        yield from without_ancillary_chunks(data)
    elif name == "JPEG" and (whole := with_end(data)) is not None:
        yield whole


def decodable_part(data: bytes, name: str) -> bytes | None:
    """Returns a truncated file in a form of which the decoder can load what is there."""
    if name == "JPEG":
        return up_to_cut(data)
    return data if name in _DECODED_IN_PART else None


def load_what_is_there(image: Image.Image) -> None:
    """Lets an open image load the pixels that a truncated file has.

    The others remain as they were allocated: 0 in all channels, or the transparent or the first
    colour of a palette. In a JPEG, libjpeg fills them with grey.

    Pillow does this with ``LOAD_TRUNCATED_IMAGES``, too, but for all threads of the process.
    """
    load = image.load

    def load_partly() -> Any:
        try:
            return load()
        except OSError as error:
            if not any(words in str(error) for words in _ENDS_EARLY):
                raise
            image.tile = []  # type: ignore[attr-defined]
            image.load_end()  # type: ignore[attr-defined]
            return load()

    image.load = load_partly  # type: ignore[method-assign]


def is_blank(pixels: Pixels) -> bool:
    """Returns whether uint8 ``(H, W, 3)`` has one colour, that of pixels that are not there."""
    flat = pixels.reshape(-1, 3)
    starts = range(0, len(flat), _CHUNK)
    return all((flat[start : start + _CHUNK] == flat[0]).all() for start in starts)
