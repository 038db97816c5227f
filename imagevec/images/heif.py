"""Decodes HEIC and other HEIF files of HEVC images with libheif, from the package ``pi_heif``.

libheif reads a file within its own security limits, and applies rotations and mirrors, which are
properties of the image. The orientation in EXIF only repeats them, so it is ignored, as the
standard says (ISO/IEC 23008-12).
"""

from __future__ import annotations

import errno
import functools
import math
import struct
import threading
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from imagevec.errors import ImageError
from imagevec.images.heif_items import (
    Items,
    Property,
    check_data,
    check_pixels,
    crop_of,
    cut_metadata,
    is_cut,
    read_items,
)

_MISSING = "HEIF needs pi_heif 1.4 or later: pip install 'imagevec[heif]' on the workers"

# libheif and libde265 end the process if they get no memory, so that it is asked for before.
# Measured: 8 to 11 for 8 bits, 21 for 12 bits, 4:4:4 and alpha.
_BYTES_PER_PIXEL = 14
_BYTES_PER_DEEP_PIXEL = 24  # of more than 8 bits or with alpha
_BYTES_PER_DECODER = 2 << 20

_ROTATIONS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)
_MIRRORS = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)


class HeifImage(Image.Image):
    """The primary image of a HEIF file as displayed, in the mode L, RGB, RGBA or RGBa.

    Opening it reads the header; ``load``, which Pillow calls, decodes the pixels. Samples of more
    than 8 bits keep the high 8.

    Args:
        data: The bytes of the file.
        max_pixels: The maximum of coded pixels, roughly; the caller checks ``size``.

    Attributes:
        is_cut: Whether the file ends before the image does.
        bits: Bits per sample, as coded.

    Raises:
        ImageError: ``unsupported_format``: another codec, a sequence without an image, or no
            ``pi_heif``. ``too_large``: the parts have far more than ``max_pixels``. ``truncated``
            or ``corrupt``.
    """

    format = "HEIF"

    def __init__(self, data: bytes, max_pixels: int) -> None:
        super().__init__()
        items = read_items(data)
        check_pixels(items, max_pixels)
        self._num_coded = max(items.pixels[item] for item in items.image())
        self.is_cut = is_cut(data, items)
        self._is_short = self.is_cut or items.is_short
        if not self.is_cut:
            check_data(data, items)
        self._steps = _own_steps(data, items)
        if self._steps:
            data = _without_steps(data, items)
        if lacking := cut_metadata(data, items):
            data = _without_metadata(data, items, lacking)
        self._coded: Any = self._primary(data)
        self._coded_size, mode = self._coded.size_mode
        self._size = functools.reduce(_size_after, self._steps, self._coded_size)
        self._mode = "L" if mode.startswith("I;16") else mode
        self.bits: int = self._coded.bit_depth

    def load(self) -> Any:
        """Decodes the pixels.

        Raises:
            ImageError: ``truncated`` or ``corrupt``.
            MemoryError: The worker has too little memory.
            OSError: The worker cannot start a thread.
        """
        if self._coded is not None:
            coded, self._coded = self._coded, None
            self.im = functools.reduce(_after, self._steps, self._decoded(coded)).im
        return super().load()

    def _primary(self, data: bytes) -> Any:
        """Returns the primary image of libheif, whose pixels are decoded when they are asked for.

        The public classes of ``pi_heif`` also copy the metadata of all images, whatever their size.
        """
        try:
            import _pi_heif
        except ImportError as error:
            raise ImageError("unsupported_format", f"{_MISSING} ({error})") from error
        to_8_bit, bgr, without_stride, to_16_bit, without_limits = True, False, False, True, False
        try:  # of libheif's threads, only one decodes at a time
            images = _pi_heif.load_file(
                data, 1, to_8_bit, bgr, without_stride, to_16_bit, "", without_limits
            )
        except TypeError as error:  # another version has other arguments
            raise ImageError("unsupported_format", f"{_MISSING} ({error})") from error
        except Exception as error:
            raise self._refused(error) from error
        primary = next((image for image in images if image is not None and image.primary), None)
        if primary is None:
            raise ImageError("corrupt", "HEIF whose primary image is none of its images")
        return primary

    def _refused(self, error: Exception) -> ImageError:
        code = "truncated" if self._is_short else "corrupt"
        return ImageError(code, f"HEIF: {str(error).strip()}")

    def _decoded(self, coded: Any) -> Image.Image:
        is_deep = coded.bit_depth > 8 or self.mode.lower().endswith("a")
        per_pixel = _BYTES_PER_DEEP_PIXEL if is_deep else _BYTES_PER_PIXEL
        num_bytes = self._num_coded * per_pixel + _BYTES_PER_DECODER
        _check_worker(num_bytes)
        try:
            pixels = coded.data
        except Exception as error:
            _check_worker(num_bytes)  # another thread may have taken them
            raise self._refused(error) from error
        size, mode = coded.size_mode
        if size != self._coded_size:
            raise ImageError("corrupt", f"HEIF of {self._coded_size} pixels decoded to {size}")
        if mode.startswith("I;16"):  # the samples fill the high bits
            wide = np.frombuffer(pixels, "<u2").reshape(size[1], coded.stride // 2)
            return Image.fromarray((wide[:, : size[0]] >> 8).astype(np.uint8))
        return Image.frombytes(mode, size, pixels, "raw", mode, coded.stride)


def _own_steps(data: bytes, items: Items) -> list[Property]:
    """Returns the transformations of a cropped image, which are not left to libheif 1.23.

    It refuses crops by more than 64 pixels, and moves the colours of odd sizes that are turned.
    Those of images without a crop, as phones write them, are left to it. Alpha must have the same,
    and no other part any of them.
    """
    steps = items.steps.get(items.primary, [])
    group = items.primary_and_alpha()
    others = [step for item in items.image() - group for step in items.steps.get(item, [])]
    is_same = all(_contents(items.steps.get(item, [])) == _contents(steps) for item in group)
    is_own = is_same and not set(others) & set(steps)
    is_plain = all(data[step.start - 4 : step.start] == step.kind for step in steps)
    return steps if is_own and is_plain and any(step.kind == b"clap" for step in steps) else []


def _contents(steps: list[Property]) -> list[tuple[bytes, bytes]]:
    return [(step.kind, step.content) for step in steps]


def _without_steps(data: bytes, items: Items) -> bytes:
    """Returns a file whose primary image and its alpha are as coded."""
    changed = bytearray(data)
    for item in items.primary_and_alpha():
        for step in items.steps[item]:
            if step.kind == b"clap":
                width, height = items.sizes[item]
                struct.pack_into(">8I", changed, step.start, width, 1, height, 1, 0, 1, 0, 1)
            else:
                changed[step.start - 4 : step.start + 1] = b"irot\0"
    return bytes(changed)


def _without_metadata(data: bytes, items: Items, lacking: list[int]) -> bytes:
    """Returns a file where the type of some items is unknown: libheif refuses a file for EXIF."""
    changed = bytearray(data)
    for item in lacking:
        start = items.kind_starts[item]
        changed[start : start + 4] = b"none"
    return bytes(changed)


def _size_after(size: tuple[int, int], step: Property) -> tuple[int, int]:
    if step.kind == b"clap":
        left, top, right, bottom = _crop(size, step)
        return right - left, bottom - top
    return (size[1], size[0]) if step.kind == b"irot" and step.content[0] & 1 else size


def _after(image: Image.Image, step: Property) -> Image.Image:
    if step.kind == b"clap":
        return image.crop(_crop(image.size, step))
    turns = _MIRRORS if step.kind == b"imir" else _ROTATIONS
    turn = turns[step.content[0] & (len(turns) - 1)]
    return image if turn is None else image.transpose(turn)


def _crop(size: tuple[int, int], step: Property) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of a crop of an image."""
    width, height, x, y = crop_of(step.content)
    left = math.floor(x + Fraction(size[0] - 1, 2) - (width - 1) / 2)
    top = math.floor(y + Fraction(size[1] - 1, 2) - (height - 1) / 2 + Fraction(1, 2))
    right, bottom = min(left + round(width), size[0]), min(top + round(height), size[1])
    left, top = max(left, 0), max(top, 0)
    if right <= left or bottom <= top:
        raise ImageError("corrupt", "HEIF with a crop outside the image")
    return left, top, right, bottom


def _check_worker(num_bytes: int) -> None:
    """Raises what the decoder would die of: it handles neither lack of memory nor of threads."""
    memory = np.empty(num_bytes, np.uint8)  # not touched, and not free before the thread has ended
    thread = threading.Thread(target=len, args=(memory,))
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "the decoder of HEIF needs a thread") from error
    thread.join()
