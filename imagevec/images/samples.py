"""Reads samples of more than 8 bits at their full depth, and what a file says about their range."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagevec.errors import ImageError
from imagevec.images.tiff import is_planar, layout_in_words

Plane = npt.NDArray[Any]

# Tags of TIFF 6.0
_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _SAMPLE_FORMAT, _SMIN_SAMPLE, _SMAX_SAMPLE = (
    258,
    262,
    281,
    339,
    340,
    341,
)
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # by the value of _SAMPLE_FORMAT

# Raw modes of Pillow that return the high byte of 16 bits, with those that return the low byte.
_SWAPPED = "B" if sys.byteorder == "little" else "L"
_LOW_BYTES = {
    raw_mode + order: raw_mode + other
    for raw_mode in ("RGB;16", "RGBX;16", "RGBA;16")
    for order, other in (("L", "B"), ("B", "L"), ("N", _SWAPPED))
} | {"LA;16B": "RGBA"}
_IS_GREY = "grey with alpha"


class Layout(NamedTuple):
    """How the samples of a file are stored.

    Attributes:
        bits: Bits per sample.
        kind: ``"unsigned"``, ``"signed"`` or ``"float"``.
        words: A description for error messages.
        is_inverted: Whether 0 is white.
        limits: The values that the file declares as black and white.
        depth: The bits that the file declares as used, if fewer; they may be the high or low ones.
    """

    bits: int = 8
    kind: str = "unsigned"
    words: str = ""
    is_inverted: bool = False
    limits: tuple[float, float] | None = None
    depth: int | None = None


def layout_of(image: Any) -> Layout:
    """Returns the layout of an image that is open and not loaded yet.

    Raises:
        ImageError: ``unsupported_format``: Pillow gets samples of this depth wrong.
    """
    if image.format == "TIFF":
        return _tiff_layout(image)
    if image.format == "PNG" and image.tile and "16" in str(image.tile[0].args):
        bits = _significant_bits(image.fp.getvalue())
        return Layout(16, words="PNG, 16 bit", depth=bits if bits in range(1, 16) else None)
    if image.format == "JPEG2000":
        return _jpeg2000_layout(image.fp.getvalue())
    bits = _bits_of_avif(image) if image.format == "AVIF" else getattr(image, "bits", 8)
    return Layout(bits, words=f"{image.format}, {bits} bit")


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


def _tiff_layout(image: Any) -> Layout:
    tags = image.tag_v2
    bits = max(tags.get(_BITS, (1,)))
    kind = _KINDS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "unsigned")
    is_full = bits == 16 and kind == "unsigned"
    if bits == 12:  # Pillow does not scale them
        limits: tuple[float, float] | None = (0, 4095)
    else:
        limits = None if is_full else _declared_limits(tags, kind)
    depth = None if kind == "float" or bits <= 8 else _declared_depth(tags)
    if depth is not None and depth > (bits - 1 if is_full else bits):
        depth = None
    words = layout_in_words(image)
    return Layout(bits, kind, words, tags.get(_PHOTOMETRIC) == 0, limits, depth)


def _declared_limits(tags: Any, kind: str) -> tuple[float, float] | None:
    low, high = (_numbers(tags.get(tag)) for tag in (_SMIN_SAMPLE, _SMAX_SAMPLE))
    low = low or ([0.0] if kind == "unsigned" else [])
    return (min(low), max(high)) if low and high and min(low) < max(high) else None


def _declared_depth(tags: Any) -> int | None:
    """The maximum may be that of the format, such as 4095, or that of the image: less than that."""
    most = _numbers(tags.get(_MAX_SAMPLE)) or _numbers(tags.get(_SMAX_SAMPLE))
    return int(max(most)).bit_length() if most and max(most) >= 1 else None


def _numbers(value: Any) -> list[float]:
    """Returns the finite numbers of a tag, which may be one or several, or something else."""
    values: Sequence[Any] = value if isinstance(value, tuple) else (value,)
    return [float(v) for v in values if isinstance(v, int | float) and np.isfinite(v)]


def _significant_bits(data: bytes) -> int:
    """Returns the most bits in the chunk sBIT of a PNG; 0 without (PNG 3rd edition, 11.3.2.4)."""
    position = 8
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 :][:4]
        if kind == b"sBIT":
            return max(data[position + 8 : position + 8 + min(length, 4)], default=0)
        if kind == b"IDAT":
            break
        position += 12 + length
    return 0


def _jpeg2000_layout(data: bytes) -> Layout:
    """Reads the marker segment SIZ (ISO/IEC 15444-1, A.5.1).

    Raises:
        ImageError: ``unsupported_format``: Pillow gets this depth wrong.
    """
    start = data.find(b"\xff\x4f\xff\x51")
    count = int.from_bytes(data[start + 40 : start + 42])
    sizes = data[start + 42 : start + 42 + 3 * min(count, 4) : 3]
    if start < 0 or not sizes:
        return Layout()
    bits, is_signed = 1 + max(size & 0x7F for size in sizes), any(size & 0x80 for size in sizes)
    kind = "signed" if is_signed and bits > 8 else "unsigned"
    words = f"JPEG2000, {count} x {bits} bit{' signed' if is_signed else ''}"
    if bits > (8 if count > 1 else 16):  # Pillow rounds white up to 256, which is 0
        raise ImageError("unsupported_format", words)
    limits = (0, 2**bits - 1) if 8 < bits < 16 and not is_signed else None
    return Layout(bits, kind, words, limits=limits)


def _bits_of_avif(image: Any) -> int:
    """Reads the first AV1CodecConfigurationBox (AV1 in ISOBMFF, section 2.3)."""
    data = image.fp.getvalue()
    start = data.find(b"av1C")
    flags = data[start + 6] if 0 <= start < len(data) - 6 else 0
    return 8 + 2 * (flags >> 6 & 1) + 2 * (flags >> 5 & 1)
