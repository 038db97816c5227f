"""Decodes images to uint8 RGB pixels.

All input is untrusted. Before decoding pixels, the header is checked: the format must be on the
allow-list and the size within ``max_pixels``. Every decoder exception becomes an ``ImageError``,
except those that say something about the worker: see ``_bad_image``.

Pixels are converted as follows:

- EXIF orientation is applied.
- CMYK, palette, grey and bilevel images are converted by Pillow's ``convert("RGB")``.
- Alpha is dropped, or transparent pixels are put over a colour: see ``transparency``.
- Of 16-bit channels the high byte is kept, unless the file or ``value_range`` says what is black
  and white. Signed and 32-bit integers and floats need that: see ``depth``.
- TIFFs that Pillow reads wrongly are corrected or refused: see ``tiff``.
- Animations and multi-page files are reduced to the first frame.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from imagevec.errors import ImageError
from imagevec.images.damaged import decodable_part, is_blank, load_what_is_there, repaired
from imagevec.images.formats import check_format
from imagevec.images.heif import HeifImage
from imagevec.images.jpeg import decode_jpeg
from imagevec.images.layouts import check_layout, check_scans, refused
from imagevec.images.pixels import Pixels, to_rgb

# A task has one core. A worker that cannot start a thread could decode no AVIF otherwise.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# What decoders that do not report a lack of memory as such take at most, in bytes per pixel: WebP
# has two canvases of 4, progressive CMYK has coefficients of 8, and Pillow copies the result.
_BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 16, "JPEG": 12}
_BYTES_PER_PIXEL_OF_OTHERS = 4  # a buffer of libtiff

_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")  # the major brands that Pillow accepts

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4


class DecodedImage(NamedTuple):
    """The pixels of an image, and its original size.

    Attributes:
        pixels: The pixels, uint8 RGB ``(H, W, 3)``, contiguous.
        width: The width of the image as displayed, in pixels.
        height: The height of the image as displayed, in pixels.
        truncated: Whether the file ends before the image does.
    """

    pixels: Pixels
    width: int
    height: int
    truncated: bool = False


def decode(
    data: bytes,
    *,
    max_pixels: int,
    formats: tuple[str, ...],
    min_side: int | None = None,
    background: str | None = None,
    value_range: tuple[float, float] | None = None,
    truncated: str = "error",
) -> DecodedImage:
    """Decodes one image.

    Args:
        data: The bytes of an image file.
        max_pixels: The maximum width x height. Pillow's own limit, which applies to the whole
            process, is raised to this value if it is lower.
        formats: The accepted formats, from ``imagevec.options.FORMATS``.
        min_side: The minimum length of both sides. JPEGs are decoded at the smallest scale of 1/1,
            1/2, 1/4 and 1/8 that keeps it; ``None`` decodes at 1/1.
        background: See ``imagevec.spec.Preprocessing``.
        value_range: See ``imagevec.spec.Preprocessing``.
        truncated: ``"accept"`` to return the pixels that a truncated file still has.

    Raises:
        ImageError: The image is empty, too large, truncated, corrupt or in another format.
        MemoryError: The worker has too little memory, which says nothing about the image.
    """
    name = check_format(data, formats).name
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    attempt = functools.partial(
        _attempt,
        name=name,
        max_pixels=max_pixels,
        min_side=min_side,
        background=background,
        value_range=value_range,
    )
    try:
        return attempt(data)
    except ImageError as error:
        if error.code not in ("truncated", "corrupt"):
            raise
        return _decode_damaged(data, name, error, attempt, truncated == "accept")


def _decode_damaged(
    data: bytes,
    name: str,
    failure: ImageError,
    attempt: Callable[..., DecodedImage],
    accept: bool,
) -> DecodedImage:
    """Decodes a file that failed, after a repair or, with ``accept``, in part.

    Raises:
        ImageError: The failure, or what remains of it after a repair.
    """
    for file in repaired(data, name):
        try:
            return attempt(file)
        except ImageError as error:
            if error.code in ("truncated", "too_large"):
                failure, data = error, file
    part = decodable_part(data, name) if accept and failure.code == "truncated" else None
    if part is not None:
        with contextlib.suppress(ImageError):
            return attempt(part, in_part=True)
    try:
        raise failure
    finally:
        del failure  # a cycle with its own traceback, which keeps the bytes


def _attempt(
    data: bytes,
    *,
    name: str,
    max_pixels: int,
    min_side: int | None,
    background: str | None,
    value_range: tuple[float, float] | None,
    in_part: bool = False,
) -> DecodedImage:
    """Decodes a file of the format ``name`` as it is, or with ``in_part`` what is there of it."""
    image = _opened(data, max_pixels, name)
    width, height = image.size
    if isinstance(image, HeifImage) and image.is_cut and not in_part:
        raise ImageError("truncated", "HEIF that ends before its image does")
    if in_part:
        load_what_is_there(image)
    try:
        decoded = _decoded(data, image, min_side, background, value_range)
    except ImageError:  # of a layout that no decoder reads
        raise
    except Exception as error:  # decoders raise more than OSError on malicious bytes
        try:
            raise _bad_image(error, data, name, width * height, opened=True) from error
        finally:
            image.close()  # the traceback would keep its pixels during a second try
    if in_part and name != "JPEG" and is_blank(decoded.pixels):
        raise ImageError("truncated", "nothing of the image is there")
    return decoded._replace(truncated=in_part)


def _opened(data: bytes, max_pixels: int, name: str) -> Image.Image:
    """Opens an image of the format ``name`` whose header is within ``max_pixels``."""
    webp_size = _webp_size(data) if name == "WEBP" else None
    if webp_size is not None:  # its decoder allocates two canvases to open it
        check_size(*webp_size, max_pixels)
    elif name == "WEBP":  # and copies the file twice
        raise refused(data, name)
    if name == "HEIF":
        heif = HeifImage(data, max_pixels)
        check_size(*heif.size, max_pixels)
        return heif
    check_layout(data, name)
    if name == "ICO":  # its decoder decodes the first icon to open it
        for sides in _icon_sizes(data):
            check_size(*sides, max_pixels)
    try:
        if name == "AVIF" and data[8:12] not in _AVIF_BRANDS:  # one is among the compatible brands
            data = data[:8] + _AVIF_BRANDS[0] + data[12:]
        image = Image.open(io.BytesIO(data), formats=[name])
        check_size(*image.size, max_pixels)
        _check_tiles(image, max_pixels)
        if name == "JPEG":
            check_scans(data, math.prod(image.size))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise refused(data, name) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow checks its own limit before the size can be read, and reports that limit.
        size = re.search(r"\d+ pixels", str(error))
        detail = f"{size[0] if size else error}, max_pixels={max_pixels}"
        raise ImageError("too_large", detail) from error
    except Exception as error:
        raise _bad_image(error, data, name, math.prod(webp_size or (0,)), opened=False) from error
    return image


def _bad_image(
    error: Exception, data: bytes, name: str, num_pixels: int, opened: bool
) -> ImageError:
    """Returns the error of an image that a decoder rejected, unless the worker is to blame.

    What an image needs is bounded by its size, which has been checked. So a ``MemoryError`` is the
    worker's. WebP, AVIF and JPEG decoders report other errors if they get no memory; these count
    only if the memory that such an image may need is available.

    Raises:
        MemoryError: The worker has too little memory for an image of this size.
        OSError: The operating system refused something, such as an open file.
    """
    needed = num_pixels * _BYTES_PER_PIXEL.get(name, _BYTES_PER_PIXEL_OF_OTHERS)
    if isinstance(error, MemoryError) or not has_memory(needed):
        size = f" of {num_pixels:,} pixels" if num_pixels else ""
        raise MemoryError(
            f"the worker has too little memory for an image{size}: "
            "increase its memory, or lower max_pixels"
        ) from error
    if _is_of_worker(error):
        raise error
    return refused(data, name, f"{type(error).__name__}: {error}", opened)


def _is_of_worker(error: Exception) -> bool:
    """Errors of the operating system have a number. Those about the bytes have none."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


def has_memory(num_bytes: int) -> bool:
    """Returns whether the worker can allocate this much. The memory is not touched."""
    try:
        np.empty(num_bytes, np.uint8)
    except MemoryError:
        return False
    return True


def _decoded(
    data: bytes,
    image: Image.Image,
    min_side: int | None,
    background: str | None,
    value_range: tuple[float, float] | None,
) -> DecodedImage:
    width, height = image.size
    if min_side is not None:
        image.draft(None, (min_side, min_side))  # only affects JPEGs
    is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")  # not CMYK
    pixels = decode_jpeg(data, image) if is_plain_jpeg else None
    if pixels is None:
        pixels = to_rgb(image, background, value_range)
    orientation = _orientation(image)  # after the pixels: Pillow orients TIFFs as it loads them
    if orientation >= 5:
        width, height = height, width
    return DecodedImage(_apply_orientation(pixels, orientation), width, height)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ``ImageError`` unless 1 <= width x height <= max_pixels."""
    if width < 1 or height < 1:
        raise ImageError("corrupt", f"{width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} pixels, max_pixels={max_pixels}")


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Checks the tiles of a TIFF: libtiff allocates a whole one, which may exceed the image."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags[tag] for tag in (TILEWIDTH, TILELENGTH) if tag in tags]
    if not all(isinstance(side, int) for side in sides):
        raise ImageError("corrupt", f"tiles of {sides} pixels")
    if len(sides) == 2:
        check_size(sides[0], sides[1], max_pixels)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Returns the size in the header of a WebP file, or ``None`` if there is none."""
    start = int.from_bytes(data[20:32], "little")
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        return (start >> 32 & 0xFFFFFF) + 1, (start >> 56 & 0xFFFFFF) + 1
    if data[12:16] == b"VP8L" and data[20:21] == b"\x2f":
        return (start >> 8 & 0x3FFF) + 1, (start >> 22 & 0x3FFF) + 1
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return start >> 48 & 0x3FFF, start >> 64 & 0x3FFF
    return None


def _icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the sizes in the headers of an ICO file's images, PNGs or BMPs without file headers.

    The latter have the height of two images, the second of which is the mask.
    """
    for number in range(int.from_bytes(data[4:6], "little")):
        entry = data[6 + 16 * number : 22 + 16 * number]
        if len(entry) < 16:
            return
        start = int.from_bytes(entry[12:], "little")
        header = data[start : start + 24]
        if header.startswith(b"\x89PNG"):
            yield int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        elif len(header) >= 12:
            width, height = struct.unpack_from("<ii", header, 4)
            yield abs(width), abs(height) // 2


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if it is missing or the EXIF block is unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception as error:  # broken metadata says nothing about the pixels
        if _is_of_worker(error):
            raise
        return 1
    return value if value in range(1, 9) else 1


def _apply_orientation(pixels: Pixels, orientation: int) -> Pixels:
    """Converts ``(H, W, 3)`` as stored to ``(H, W, 3)`` or ``(W, H, 3)`` as displayed."""
    if orientation >= 5:  # 5 to 8 are 1, 4, 3, 2 after a transposition
        pixels = pixels.transpose(1, 0, 2)
        orientation = {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    flipped = {1: (), 2: (1,), 3: (0, 1), 4: (0,)}[orientation]
    return np.ascontiguousarray(np.flip(pixels, flipped))
