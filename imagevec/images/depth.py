"""Maps samples of more than 8 bits, signed ones and floats to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagevec.errors import ImageError
from imagevec.images.ranges import Layout, layout_of
from imagevec.images.samples import Plane, open_low_bytes, read_planes

Range = tuple[float, float]

_CHUNK = 1 << 18  # samples that are mapped at once, as float64


def to_8_bit(image: Any, value_range: Range | None, with_alpha: bool) -> Image.Image:
    """Returns an image whose channels have 8 bits: the same one if it has no others.

    Black and white are the ends of ``value_range``, else those that the file declares, else those
    of unsigned integers of 16 bits, which keep their high byte. Values outside are clipped, and NaN
    is 0. Where 0 is white (TIFF), so is ``low``.

    Args:
        image: An open image that is not loaded yet.
        value_range: The values that become 0 and 255.
        with_alpha: Whether the colour that a PNG declares as transparent is needed.

    Raises:
        ImageError: ``unsupported_format``: the range of the samples is not known, or Pillow reads
            only their high bits.
    """
    layout = layout_of(image)
    if layout.bits <= 8 and layout.kind == "unsigned":
        return image  # type: ignore[no-any-return]
    limits = value_range or layout.limits
    key = image.info.get("transparency") if with_alpha else None
    if limits is None and layout.depth is None:
        if layout.bits > 16 or layout.kind != "unsigned":
            raise _without_range(layout)
        if key is None and not image.mode.startswith("I;16"):
            return image  # type: ignore[no-any-return]  # Pillow keeps the high byte
    low = open_low_bytes(image)
    if limits is None and key is None and _fills_high_bits(image, layout):
        return image  # type: ignore[no-any-return]
    return _merged(read_planes(image, layout, low), limits, key, layout)


def _merged(
    planes: list[Plane], limits: Range | None, key: int | tuple[int, ...] | None, layout: Layout
) -> Image.Image:
    """Returns the image of the channels, of which the last of 2 or 4 is alpha."""
    alpha = planes.pop() if len(planes) in (2, 4) else None
    limits = limits or _range_of_depth(planes, layout, layout.depth)
    channels = [_levels(plane, limits, layout) for plane in planes]
    if alpha is not None:
        channels.append(
            _levels(alpha, _range_of_depth([alpha], layout, layout.alpha_depth), layout)
        )
    elif key is not None:
        channels.append(_alpha_of_key(planes, key))
    mode = ("L", "LA", "RGB", "RGBA")[len(channels) - 1]
    return Image.merge(mode, [Image.fromarray(channel) for channel in channels])


def _without_range(layout: Layout) -> ImageError:
    return ImageError("unsupported_format", f"{layout.words}: set value_range=(low, high)")


def _fills_high_bits(image: Any, layout: Layout) -> bool:
    """Returns whether the high bytes alone show that the declared bits are not the low ones."""
    if layout.depth is None or len(image.getbands()) == 1:
        return False
    extrema = image.getextrema()
    colours = extrema if image.mode == "CMYK" else extrema[:3]
    return any(high >= 1 << max(layout.depth - 8, 0) for _, high in colours)


def _range_of_depth(planes: Sequence[Plane], layout: Layout, depth: int | None) -> Range | None:
    """Returns the range of the declared depth if these samples have it; ``None`` for 16 bits.

    Raises:
        ImageError: There is no other range.
    """
    if depth is not None and _are_right_aligned(planes, layout, depth):
        return 0, 2**depth - 1
    if layout.bits > 16 or layout.kind != "unsigned":
        raise _without_range(layout)
    return None


def _are_right_aligned(planes: Sequence[Plane], layout: Layout, depth: int) -> bool:
    """Returns whether the declared bits are the low ones, as cameras and medical devices write.

    In a PNG they should be the high ones, and the others repeat them or are 0.
    """
    if any(plane.max() >= 1 << depth for plane in planes):
        return False
    if not layout.words.startswith("PNG"):
        return True
    expected = _scaled_samples(depth)
    return not all(expected[plane].all() for plane in planes)


def _scaled_samples(depth: int) -> npt.NDArray[np.bool_]:
    """Marks the 16-bit values to which samples of fewer bits are scaled, ``(65536,)``.

    The standard lists three ways: linear scaling, repeated bits and zeros (PNG 3rd edition, 12.4).
    """
    samples = np.arange(1 << depth, dtype=np.uint32)
    most = (1 << depth) - 1
    zeros = samples << (16 - depth)
    repeated = zeros
    for shift in range(depth, 16, depth):
        repeated = repeated | zeros >> shift
    is_scaled = np.zeros(1 << 16, np.bool_)
    for scaled in (zeros, repeated, samples * 65535 // most, (samples * 65535 + most // 2) // most):
        is_scaled[scaled] = True
    return is_scaled


def _levels(plane: Plane, limits: Range | None, layout: Layout) -> npt.NDArray[np.uint8]:
    """Maps a range to 0..255, uint8 ``(H, W)``; ``None`` keeps the high byte of 16 bits."""
    if limits is None:
        levels: npt.NDArray[np.uint8] = (plane >> 8).astype(np.uint8)
        return ~levels if layout.is_inverted else levels
    black, white = reversed(limits) if layout.is_inverted else limits
    if plane.dtype == np.uint16:
        table = _mapped(np.arange(1 << 16), black, white)
        return table[plane]
    flat = plane.reshape(-1)
    chunks = [flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK)]
    return np.concatenate([_mapped(chunk, black, white) for chunk in chunks]).reshape(plane.shape)


def _mapped(values: Plane, black: float, white: float) -> npt.NDArray[np.uint8]:
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.rint((values.astype(np.float64) - black) / (white - black) * 255)
    return np.fmin(np.fmax(levels, 0), 255).astype(np.uint8)  # fmax turns NaN into 0


def _alpha_of_key(planes: Sequence[Plane], key: int | tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Returns 0 where a pixel has the transparent colour of a PNG, else 255."""
    keys = key if isinstance(key, tuple) else (key,)
    is_key = np.logical_and.reduce([p == k for p, k in zip(planes, keys, strict=True)])
    return np.where(is_key, 0, 255).astype(np.uint8)
