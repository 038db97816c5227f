"""Converts an image of any mode of Pillow to uint8 RGB pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def to_rgb(
    image: Image.Image,
    background: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> Pixels:
    """Returns a copy of the pixels, uint8 ``(H, W, 3)``.

    Args:
        image: An open image.
        background: See ``imagevec.spec.Preprocessing``.
        value_range: See ``imagevec.spec.Preprocessing``.
    """
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)  # (H, W)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
