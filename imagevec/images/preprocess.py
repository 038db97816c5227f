"""uint8 pixels of any size to the model's input: resize, centre crop, normalise.

It follows torchvision's ``ImageClassification`` preset (``transforms/_presets.py``) on a Pillow
image: antialiased resize of the shorter side in uint8, centre crop, scale to 0..1, subtract mean,
divide by std. Normalisation is of a whole batch: as uint8 it is a quarter of float32.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from imagevec.spec import Preprocessing

# Above this many times the crop's pixels, a resized image is not made whole (see resize_and_crop).
_MAX_RESIZED_RATIO = 32


def preprocess(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 ``(3, H, W)`` to normalised float32 ``(3, S, S)``, S being ``crop_size``."""
    return normalize(resize_and_crop(pixels, preprocessing)[None], preprocessing)[0]


def resize_and_crop(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 ``(3, H, W)`` to uint8 ``(3, S, S)``.

    A 3000x1 image resized whole to a shorter side of 256 would take 590 MB for a crop of 224x224.
    Such extreme shapes go through Pillow, which computes only the pixels of a crop, and to which
    torchvision's kernel is equal but for rounding.
    """
    crop = preprocessing.crop_size
    height, width = _resized_size(pixels, preprocessing)
    top, left = round((height - crop) / 2), round((width - crop) / 2)  # as torchvision's CenterCrop
    if height * width > _MAX_RESIZED_RATIO * crop * crop:
        return _resize_crop_only(pixels, (height, width), (top, left), preprocessing)
    resized: torch.Tensor = F.resize(
        pixels,
        [height, width],
        interpolation=InterpolationMode(preprocessing.interpolation),
        antialias=True,
    )
    return resized[:, top : top + crop, left : left + crop]


def normalize(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 ``(N, 3, S, S)`` to float32 ``(N, 3, S, S)`` on the same device."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def _resized_size(pixels: torch.Tensor, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width after the resize, rounded down as in torchvision's ``Resize``."""
    _, height, width = pixels.shape
    size = preprocessing.resize_size
    if preprocessing.squash:
        return size, size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _resize_crop_only(
    pixels: torch.Tensor,
    resized: tuple[int, int],
    corner: tuple[int, int],
    preprocessing: Preprocessing,
) -> torch.Tensor:
    _, height, width = pixels.shape
    crop = preprocessing.crop_size
    scale_y, scale_x = height / resized[0], width / resized[1]  # source pixels an output pixel
    top, left = corner[0] * scale_y, corner[1] * scale_x
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)
    cropped = image.resize(
        (crop, crop),
        Image.Resampling[preprocessing.interpolation.upper()],
        box=(left, top, left + crop * scale_x, top + crop * scale_y),
    )
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)
