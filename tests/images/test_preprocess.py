from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from imagevec import Preprocessing
from imagevec.images.preprocess import normalize, preprocess, resize_and_crop
from tests.helpers.images import cosine, photo
from tests.helpers.pipeline import pixels_of, run_python

SIZES = [(500, 375), (375, 500), (224, 224), (256, 256), (100, 80), (31, 47), (900, 300), (1, 1)]


def by_torchvision(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """torchvision's preset on a Pillow image."""
    preset = ImageClassification(
        crop_size=preprocessing.crop_size,
        resize_size=preprocessing.resize_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=InterpolationMode(preprocessing.interpolation),
    )
    return preset(image)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_torchvisions_preset(size, interpolation):
    preprocessing = Preprocessing(interpolation=interpolation)
    image = photo(*size)
    ours = preprocess(pixels_of(image), preprocessing)
    theirs = by_torchvision(image, preprocessing)
    assert ours.shape == theirs.shape == (3, 224, 224)
    assert cosine(ours.flatten(), theirs.flatten()) >= 0.9999
    assert (ours - theirs).abs().max() < 3 / 255 / min(preprocessing.std)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(resize_size=232),
        Preprocessing(resize_size=224, crop_size=224),
        Preprocessing(resize_size=342, crop_size=299, mean=(0.5,) * 3, std=(0.5,) * 3),
        Preprocessing(resize_size=33, crop_size=32),
        Preprocessing(resize_size=245, crop_size=224, interpolation="bicubic"),
    ],
    ids=lambda preprocessing: f"{preprocessing.resize_size}-{preprocessing.crop_size}",
)
@pytest.mark.parametrize("size", [(321, 240), (240, 321)], ids=str)
def test_every_size_is_cropped_where_torchvision_crops(size, preprocessing):
    image = photo(*size)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), by_torchvision(image, preprocessing).flatten()) >= 0.9999


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2000, 20), (20, 2000), (1501, 37), (37, 1501)], ids=str)
def test_extreme_aspect_ratios_are_as_by_torchvision(size, interpolation):
    preprocessing = Preprocessing(interpolation=interpolation)
    image = photo(*size)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), by_torchvision(image, preprocessing).flatten()) >= 0.9999


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1200, 40)], ids=str)
def test_squash_resizes_to_a_square(size):
    preprocessing = Preprocessing(resize_size=248, crop_size=224, squash=True)
    image = photo(*size)
    square = image.resize((248, 248), Image.Resampling.BILINEAR)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), by_torchvision(square, preprocessing).flatten()) >= 0.9999


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2999), (224, 223)], ids=str)
def test_any_size_becomes_the_crop(size, squash):
    cropped = resize_and_crop(pixels_of(photo(*size)), Preprocessing(squash=squash))
    assert cropped.dtype == torch.uint8
    assert cropped.shape == (3, 224, 224)


def test_one_colour_stays_that_colour():
    red = pixels_of(Image.new("RGB", (3000, 1), (250, 20, 3)))
    cropped = resize_and_crop(red, Preprocessing())
    assert torch.equal(cropped, torch.tensor([250, 20, 3]).view(3, 1, 1).expand(3, 224, 224))


def test_the_middle_is_kept():
    pixels = torch.zeros(3, 300, 900, dtype=torch.uint8)
    pixels[:, :, 300:600] = 200
    cropped = resize_and_crop(pixels, Preprocessing(resize_size=224, crop_size=224))
    assert (cropped[:, :, 2:-2] == 200).all()


@pytest.mark.parametrize("size", ["3000, 1", "1, 3000"])
def test_extreme_aspect_ratios_take_little_memory(size):
    used = run_python(f"""
import resource, sys
import torch
from imagevec import Preprocessing
from imagevec.images.preprocess import resize_and_crop

def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

resize_and_crop(torch.zeros(3, 500, 375, dtype=torch.uint8), Preprocessing())
before = peak_bytes()
resize_and_crop(torch.zeros(3, {size}, dtype=torch.uint8), Preprocessing())
print(peak_bytes() - before)
""")
    assert int(used) < 100e6  # resized whole, to 768000x256, it would be 590 MB


def test_normalize_is_mean_and_std():
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 4, 4)
    normal = normalize(images, preprocessing)
    assert normal.dtype == torch.float32
    assert normal.shape == (2, 3, 4, 4)
    expected = [(0 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (1 - 0.3) / 1.0]
    np.testing.assert_allclose(normal[1, :, 0, 0], expected, atol=1e-6)


def test_normalize_leaves_its_input():
    images = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    normalize(images, Preprocessing())
    assert (images == 7).all()
