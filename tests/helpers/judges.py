"""Other programs that decode images, and the measure by which their pixels are compared."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image

from imagevec import Preprocessing
from imagevec.images.decode import Pixels
from tests.helpers.images import cosine, encode
from tests.helpers.pipeline import decoded, preprocess

IMAGEMAGICK = shutil.which("convert-im6.q16")
needs_imagemagick = pytest.mark.skipif(
    IMAGEMAGICK is None, reason="convert-im6.q16 of ImageMagick is not installed"
)

SAME = 0.999
"""The least cosine between decodes of one picture."""

_SMALL = Preprocessing(resize_size=48, crop_size=48)


def by_vips(data: bytes, background: tuple[int, int, int] | None = None) -> Pixels:
    """The pixels by libvips, over a colour; without one, alpha is dropped."""
    image: Any = pyvips.Image.new_from_buffer(data, "")
    is_wide = image.format == "ushort"
    if background is None:
        image = image.extract_band(0, n=image.bands - image.hasalpha())
    elif image.hasalpha():
        image = image.colourspace("rgb16" if is_wide else "srgb")
        image = image.flatten(background=[level * (257 if is_wide else 1) for level in background])
    pixels = image.colourspace("srgb").numpy()
    return np.broadcast_to(np.atleast_3d(pixels), (*pixels.shape[:2], 3))


def by_imagemagick(data: bytes, format: str, background: str) -> Pixels:
    """The pixels of the first frame by ImageMagick, over a colour."""
    command = [str(IMAGEMAGICK), f"{format}:-[0]", "-background", background, "-flatten"]
    done = subprocess.run([*command, "-depth", "8", "PNG:-"], input=data, capture_output=True)
    return np.array(Image.open(io.BytesIO(done.stdout)).convert("RGB"))


def by_tifffile(data: bytes) -> np.ndarray:
    """The samples of a TIFF as they are stored, ``(H, W)`` or ``(H, W, C)``."""
    (page,) = tifffile.TiffFile(io.BytesIO(data)).pages
    samples = np.asarray(page.asarray())
    return np.moveaxis(samples, 0, 2) if page.axes == "SYX" else samples


@functools.cache
def _model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, stride=2),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 5, stride=2),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(3),
            torch.nn.Flatten(),
        )


def vector(pixels: Pixels) -> np.ndarray:
    """The vector of a small model with random weights."""
    with torch.inference_mode():
        return np.asarray(_model()(preprocess(pixels, _SMALL)[None])[0])


def assert_same(pixels: Pixels, judged: Pixels) -> None:
    """Compares pixels with another program's, both in vectors too, as if saved as 8-bit PNG."""
    plain = decoded(encode(Image.fromarray(np.ascontiguousarray(judged)))).pixels
    assert pixels.shape == plain.shape
    assert cosine(pixels.ravel(), plain.ravel()) >= SAME
    assert cosine(vector(pixels), vector(plain)) >= SAME
