"""How the samples of a file are stored: their depth, and what the file says about their range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from imagevec.errors import ImageError
from imagevec.images.tiff import layout_in_words

# Tags of TIFF 6.0
_BITS, _PHOTOMETRIC, _MAX_SAMPLE = 258, 262, 281
_SAMPLE_FORMAT, _SMIN_SAMPLE, _SMAX_SAMPLE = 339, 340, 341
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # by the value of _SAMPLE_FORMAT


class Layout(NamedTuple):
    """How the samples of a file are stored.

    Attributes:
        bits: Bits per sample.
        kind: ``"unsigned"``, ``"signed"`` or ``"float"``.
        words: A description for error messages.
        is_inverted: Whether 0 is white.
        limits: The values that the file declares as black and white.
        depth: The bits that the file declares as used, if fewer; they may be the high or low ones.
        alpha_depth: The same of alpha.
    """

    bits: int = 8
    kind: str = "unsigned"
    words: str = ""
    is_inverted: bool = False
    limits: tuple[float, float] | None = None
    depth: int | None = None
    alpha_depth: int | None = None


def layout_of(image: Any) -> Layout:
    """Returns the layout of an image that is open and not loaded yet.

    Raises:
        ImageError: ``unsupported_format``: Pillow gets samples of this depth wrong.
    """
    if image.format == "TIFF":
        return _tiff_layout(image)
    if image.format == "PNG" and image.tile and "16" in str(image.tile[0].args):
        return _png_layout(image.fp.getvalue())
    if image.format == "JPEG2000":
        return _jpeg2000_layout(image.fp.getvalue())
    bits = _bits_of_avif(image) if image.format == "AVIF" else getattr(image, "bits", 8)
    return Layout(bits, words=f"{image.format}, {bits} bit")


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
    return Layout(bits, kind, words, tags.get(_PHOTOMETRIC) == 0, limits, depth, depth)


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


def _png_layout(data: bytes) -> Layout:
    """Returns the layout of a PNG of 16 bits."""
    bits = [n if n in range(1, 16) else None for n in _significant_bits(data)]
    alpha_bits = bits.pop() if len(bits) in (2, 4) else None
    depth = None if None in bits else max(bits, default=None)  # type: ignore[type-var]
    return Layout(16, words="PNG, 16 bit", depth=depth, alpha_depth=alpha_bits)


def _significant_bits(data: bytes) -> bytes:
    """Returns the content of the chunk sBIT, one byte a channel (PNG 3rd edition, 11.3.2.4)."""
    position = 8
    while position + 8 <= len(data):
        start = position + 8
        length, kind = int.from_bytes(data[position : start - 4], "big"), data[start - 4 : start]
        if kind == b"sBIT":
            return data[start : start + min(length, 4)]
        if kind == b"IDAT":
            break
        position = start + length + 4
    return b""


def _jpeg2000_layout(data: bytes) -> Layout:
    """Reads the marker segment SIZ (ISO/IEC 15444-1, A.5.1).

    Raises:
        ImageError: ``unsupported_format``: Pillow gets this depth wrong.
    """
    start = data.find(b"\xff\x4f\xff\x51")
    count = int.from_bytes(data[start + 40 : start + 42], "big")
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
