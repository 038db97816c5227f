"""Decodes images to uint8 RGB pixels.

All input is untrusted. Before decoding pixels, the header is checked: the format must be on the
allow-list and the size within ``max_pixels``. Every decoder exception becomes an ``ImageError``.

Pixels are converted as follows:

- EXIF orientation is applied.
- CMYK, palette, grey and bilevel images are converted by Pillow's ``convert("RGB")``, which drops
  alpha without blending.
- 16-bit channels keep the high byte, as Pillow does for 16-bit RGB. Its ``convert`` would clip
  16-bit grey at 255.
- 32-bit integers and floats (some TIFFs) have no defined scale: ``convert`` clips them to 0 to 255.
- Animations and multi-page files are reduced to the first frame.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from imagevec.errors import ImageError

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
}

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4


Pixels = npt.NDArray[np.uint8]


class DecodedImage(NamedTuple):
    """The pixels of an image, and its original size.

    Attributes:
        pixels: The pixels, uint8 RGB ``(H, W, 3)``, contiguous.
        width: The width of the image as displayed, in pixels.
        height: The height of the image as displayed, in pixels.
    """

    pixels: Pixels
    width: int
    height: int


def decode(
    data: bytes, *, max_pixels: int, formats: tuple[str, ...], min_side: int | None = None
) -> DecodedImage:
    """Decodes one image.

    Args:
        data: The bytes of an image file.
        max_pixels: The maximum width x height. Pillow's own limit, which applies to the whole
            process, is raised to this value if it is lower.
        formats: The accepted formats, from ``imagevec.options.FORMATS``.
        min_side: The minimum length of both sides. JPEGs are decoded at the smallest scale of 1/1,
            1/2, 1/4 and 1/8 that keeps it; ``None`` decodes at 1/1.

    Raises:
        ImageError: The image is empty, too large, truncated, corrupt or in another format.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        return _decode(data, max_pixels, formats, min_side)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data, formats) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow checks its own limit before the size can be read, and reports that limit.
        size = re.search(r"\d+ pixels", str(error))
        detail = f"{size[0] if size else error}, max_pixels={max_pixels}"
        raise ImageError("too_large", detail) from error
    except Exception as error:  # decoders raise more than OSError on malicious bytes
        code = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise ImageError(code, f"{type(error).__name__}: {error}") from error


def _decode(
    data: bytes, max_pixels: int, formats: tuple[str, ...], min_side: int | None
) -> DecodedImage:
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    check_size(width, height, max_pixels)
    if min_side is not None:
        image.draft(None, (min_side, min_side))  # only affects JPEGs
    is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")  # not CMYK
    pixels = _decode_jpeg(data, image) if is_plain_jpeg else None
    if pixels is None:
        pixels = _rgb(image)
    orientation = _orientation(image)  # after the pixels: Pillow orients TIFFs as it loads them
    if orientation >= 5:
        width, height = height, width
    return DecodedImage(_apply_orientation(pixels, orientation), width, height)


def _decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Returns uint8 RGB ``(H, W, 3)`` faster than Pillow, or ``None`` to leave errors to Pillow.

    Both use libjpeg-turbo with the same settings, so the pixels are equal at every scale. The
    default ``strict`` mode rejects every file with a libjpeg warning, and Pillow then decides.
    """
    width, height = image.size  # after ``draft``, of the scaled image
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ``ImageError`` unless 1 <= width x height <= max_pixels."""
    if width < 1 or height < 1:
        raise ImageError("corrupt", f"{width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} pixels, max_pixels={max_pixels}")


def _rgb(image: Image.Image) -> Pixels:
    """Returns a copy of the pixels, uint8 ``(H, W, 3)``."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)  # (H, W)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if it is missing or the EXIF block is unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def _apply_orientation(pixels: Pixels, orientation: int) -> Pixels:
    """Converts ``(H, W, 3)`` as stored to ``(H, W, 3)`` or ``(W, H, 3)`` as displayed."""
    if orientation >= 5:  # 5 to 8 are 1, 4, 3, 2 after a transposition
        pixels = pixels.transpose(1, 0, 2)
        orientation = {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    flipped = {1: (), 2: (1,), 3: (0, 1), 4: (0,)}[orientation]
    return np.ascontiguousarray(np.flip(pixels, flipped))


def _unidentified(data: bytes, formats: Sequence[str]) -> ImageError:
    found = next((name for magic, name in _SIGNATURES.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = "WEBP"
    elif data[4:12] in (b"ftypavif", b"ftypavis"):
        found = "AVIF"
    if found in formats:
        return ImageError("corrupt", f"{found} with a broken header")
    return ImageError("unsupported_format", found or f"starts with {data[:8]!r}")
