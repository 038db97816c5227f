"""uint8 pixels of any size to the model's input: antialiased resize and centre crop.

The pixels are those of torchvision's ``ImageClassification`` preset (``transforms/_presets.py``)
on a Pillow image, but for rounding: of 200 photos 0.26 % of the values differ from Pillow's, by 1
(0.53 % if bicubic, by 2 at most). Each axis is resized by itself, to uint8, the horizontal one
first, since Pillow does so wherever the aspect ratio is kept. Normalisation is the engine's: as
uint8, a batch is a quarter of float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from imagevec.images.decode import Pixels
from imagevec.spec import Preprocessing

try:  # the Rust crate fast_image_resize: a sixth of Pillow's time
    from cykooz_resizer import rust_lib
except ImportError:  # no wheel for this machine, Linux on Arm for example
    rust_lib = None

# Above this many times the crop's pixels, Pillow does not make a resized image whole.
_MAX_RESIZED_RATIO = 32

_U8X3 = 3
_CONVOLUTION = 2
_FILTERS = {"bilinear": 2, "bicubic": 3}  # numbers of cykooz_resizer.FilterType; 3 is catmull_rom
_SUPPORT = {"bilinear": 1, "bicubic": 2}  # pixels that a filter reaches to each side, at scale 1


class _Geometry(NamedTuple):
    """Where the crop is.

    Attributes:
        height: Of the whole resized image.
        width: Of the whole resized image.
        top: Of the crop in it.
        left: Of the crop in it.
        size: Of the crop's sides.
    """

    height: int
    width: int
    top: int
    left: int
    size: int


def resize_and_crop(pixels: Pixels, preprocessing: Preprocessing) -> Pixels:
    """uint8 ``(H, W, 3)`` to uint8 ``(S, S, 3)``, S being ``crop_size``.

    Only the pixels of the crop are computed: a 3000x1 image, resized whole to a shorter side of
    256, would take 590 MB for a crop of 224x224.
    """
    geometry = _geometry(pixels.shape[0], pixels.shape[1], preprocessing)
    resize = _by_pillow if rust_lib is None else _by_cykooz
    return resize(pixels, geometry, preprocessing.interpolation)


def _geometry(height: int, width: int, preprocessing: Preprocessing) -> _Geometry:
    """Rounded as torchvision's ``Resize`` (down) and ``CenterCrop`` (to even) do."""
    size, crop = preprocessing.resize_size, preprocessing.crop_size
    if preprocessing.squash:
        resized = (size, size)
    elif height <= width:
        resized = (size, int(size * width / height))
    else:
        resized = (int(size * height / width), size)
    top, left = (round((side - crop) / 2) for side in resized)
    return _Geometry(*resized, top, left, crop)


def _by_cykooz(pixels: Pixels, to: _Geometry, interpolation: str) -> Pixels:
    height, width, _ = pixels.shape
    scale_y, scale_x = height / to.height, width / to.width  # source pixels an output pixel
    reach = _SUPPORT[interpolation] * max(scale_y, 1) + 1
    first = max(0, math.floor(to.top * scale_y - reach))  # of the rows that the crop needs
    last = min(height, math.ceil((to.top + to.size) * scale_y + reach))
    rows = last - first
    # A box of the whole width is not to be wider, by a rounding error.
    left, top = to.left * scale_x, to.top * scale_y - first
    box = (left, 0, min(to.size * scale_x, width - left), rows)
    image = _resized(
        pixels[first:last].tobytes(), (width, rows), box, (to.size, rows), interpolation
    )
    box = (0, top, to.size, min(to.size * scale_y, rows - top))
    image = _resized(image, (to.size, rows), box, (to.size, to.size), interpolation)
    return np.frombuffer(image, np.uint8).reshape(to.size, to.size, 3)


def _resized(
    image: bytes,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    new_size: tuple[int, int],
    interpolation: str,
) -> bytes:
    """A box (left, top, width, height) of an image, at another (width, height)."""
    rust: Any = rust_lib
    source = rust.Image(*size, _U8X3, image)
    target = rust.Image(*new_size, _U8X3, None)
    options = rust.RustResizeOptions().set_resize_alg(_CONVOLUTION, _FILTERS[interpolation], 2)
    rust.RustResizer().resize(source, target, options.set_crop_box(*box).set_use_alpha(False))
    buffer: bytes = target.buffer()
    return buffer


def _by_pillow(pixels: Pixels, to: _Geometry, interpolation: str) -> Pixels:
    image = Image.fromarray(pixels)
    resample = Image.Resampling[interpolation.upper()]
    left, top, right, bottom = to.left, to.top, to.left + to.size, to.top + to.size
    if to.height * to.width <= _MAX_RESIZED_RATIO * to.size**2:
        whole = image.resize((to.width, to.height), resample)
        return np.asarray(whole)[top:bottom, left:right]
    scale_y, scale_x = image.height / to.height, image.width / to.width
    box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
    return np.asarray(image.resize((to.size, to.size), resample, box=box))
