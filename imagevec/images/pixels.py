"""Converts an image of any mode of Pillow to uint8 RGB pixels."""

from __future__ import annotations

from typing import Any

from imagevec.images.depth import to_8_bit
from imagevec.images.tiff import repair
from imagevec.images.transparency import Pixels, flattened

__all__ = ["Pixels", "to_rgb"]


def to_rgb(
    image: Any,
    background: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> Pixels:
    """Returns a copy of the pixels, uint8 ``(H, W, 3)``.

    Args:
        image: An open image that is not loaded yet.
        background: See ``imagevec.spec.Preprocessing``.
        value_range: See ``imagevec.spec.Preprocessing``.

    Raises:
        ImageError: ``unsupported_format``: the layout has no agreed meaning, or is not read right.
    """
    with_alpha = background is not None
    if image.format == "TIFF":
        repair(image, with_alpha)
    return flattened(to_8_bit(image, value_range, with_alpha), background)
