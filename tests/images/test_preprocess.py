from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms._presets import ImageClassification

from imagevec import Preprocessing
from imagevec.engines.torch_engine import normalize
from imagevec.images import preprocess as module
from imagevec.images.preprocess import resize_and_crop
from tests.helpers.images import cosine, photo
from tests.helpers.pipeline import pixels_of, preprocess, run_python

SIZES = [(500, 375), (375, 500), (224, 224), (256, 256), (100, 80), (31, 47), (900, 300), (1, 1)]
PHOTO_SIZES = [(500, 375), (375, 500), (800, 1200), (321, 240), (240, 321), (80, 60)]

NO_CYKOOZ = "cykooz-resizer has no wheel for this machine"
needs_cykooz = pytest.mark.skipif(module.rust_lib is None, reason=NO_CYKOOZ)


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


@pytest.fixture(params=["cykooz", "Pillow"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``resize_and_crop`` with cykooz-resizer, and as it is without."""
    if request.param == "Pillow":
        monkeypatch.setattr(module, "rust_lib", None)
    elif module.rust_lib is None:
        pytest.skip(NO_CYKOOZ)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("either_way")
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
@pytest.mark.usefixtures("either_way")
def test_every_size_is_cropped_where_torchvision_crops(size, preprocessing):
    image = photo(*size)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), by_torchvision(image, preprocessing).flatten()) >= 0.9999


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2000, 20), (20, 2000), (1501, 37), (37, 1501)], ids=str)
@pytest.mark.usefixtures("either_way")
def test_extreme_aspect_ratios_are_as_by_torchvision(size, interpolation):
    preprocessing = Preprocessing(interpolation=interpolation)
    image = photo(*size)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), by_torchvision(image, preprocessing).flatten()) >= 0.9999


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1200, 40)], ids=str)
@pytest.mark.usefixtures("either_way")
def test_squash_resizes_to_a_square(size):
    preprocessing = Preprocessing(resize_size=248, crop_size=224, squash=True)
    image = photo(*size)
    square = image.resize((248, 248), Image.Resampling.BILINEAR)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), by_torchvision(square, preprocessing).flatten()) >= 0.9999


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2999), (224, 223)], ids=str)
@pytest.mark.usefixtures("either_way")
def test_any_size_becomes_the_crop(size, squash):
    cropped = resize_and_crop(pixels_of(photo(*size)), Preprocessing(squash=squash))
    assert cropped.dtype == np.uint8
    assert cropped.shape == (224, 224, 3)


@pytest.mark.usefixtures("either_way")
def test_one_colour_stays_that_colour():
    red = pixels_of(Image.new("RGB", (3000, 1), (250, 20, 3)))
    cropped = resize_and_crop(red, Preprocessing())
    assert np.array_equal(cropped, np.broadcast_to([250, 20, 3], (224, 224, 3)))


@pytest.mark.usefixtures("either_way")
def test_the_middle_is_kept():
    pixels = np.zeros((300, 900, 3), np.uint8)
    pixels[:, 300:600] = 200
    cropped = resize_and_crop(pixels, Preprocessing(resize_size=224, crop_size=224))
    assert (cropped[:, 2:-2] == 200).all()


@pytest.mark.parametrize("rust_lib", ["module.rust_lib", "None"])
@pytest.mark.parametrize("size", ["3000, 1", "1, 3000"])
def test_extreme_aspect_ratios_take_little_memory(size, rust_lib):
    used = run_python(f"""
import resource, sys
from pathlib import Path
import numpy as np
from imagevec import Preprocessing
from imagevec.images import preprocess as module
from imagevec.images.preprocess import resize_and_crop

module.rust_lib = {rust_lib}

def peak_bytes():
    if sys.platform == "linux":  # where ru_maxrss begins with the peak of the tests' own process
        (peak,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
        return 1024 * int(peak.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

resize_and_crop(np.zeros((375, 500, 3), np.uint8), Preprocessing())
before = peak_bytes()
resize_and_crop(np.zeros(({size}, 3), np.uint8), Preprocessing())
print(peak_bytes() - before)
""")
    assert int(used) < 100e6  # resized whole, to 768000x256, it would be 590 MB


def resized_whole(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Pillow's resize of all, and the middle of that, as int."""
    to, crop = preprocessing.resize_size, preprocessing.crop_size
    assert isinstance(to, int) and isinstance(crop, int)
    width, height = (to * side // min(image.size) for side in image.size)
    size = (width, height)
    left, top = (round((side - crop) / 2) for side in size)
    resized = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    return np.asarray(resized.crop((left, top, left + crop, top + crop))).astype(int)


@needs_cykooz
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_cykooz_differs_from_pillow_by_rounding_alone(interpolation):
    preprocessing = Preprocessing(interpolation=interpolation)
    differences = []
    for seed, size in enumerate(PHOTO_SIZES):
        image = photo(*size, seed)
        ours = resize_and_crop(pixels_of(image), preprocessing)
        differences.append(np.abs(ours - resized_whole(image, preprocessing)))
    assert np.max(differences) <= 2
    assert np.count_nonzero(differences) <= 0.006 * np.size(differences)


@needs_cykooz
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2000, 1500), (1500, 2000), (40, 30)], ids=str)
def test_rows_that_are_left_out_do_not_matter(size, interpolation, monkeypatch):
    preprocessing = Preprocessing(resize_size=64, crop_size=32, interpolation=interpolation)
    cells = np.random.default_rng(0).integers(0, 2, (96, 96, 3), np.uint8) * 255
    pixels = pixels_of(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST))
    of_some_rows = resize_and_crop(pixels, preprocessing)
    monkeypatch.setattr(module, "_SUPPORT", {interpolation: 10_000})
    assert np.array_equal(of_some_rows, resize_and_crop(pixels, preprocessing))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", PHOTO_SIZES, ids=str)
def test_without_cykooz_it_is_pillows_resize_and_crop(size, interpolation, monkeypatch):
    def by_cykooz(*args: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(module, "rust_lib", None)
    monkeypatch.setattr(module, "_by_cykooz", by_cykooz)
    image, preprocessing = photo(*size), Preprocessing(interpolation=interpolation)
    ours = resize_and_crop(pixels_of(image), preprocessing)
    assert np.array_equal(ours, resized_whole(image, preprocessing))


@needs_cykooz
@pytest.mark.parametrize("squash", [False, True])
def test_a_crop_of_all_that_is_resized_has_room_in_every_size(squash):
    preprocessing = Preprocessing(resize_size=224, crop_size=224, squash=squash)
    for side in range(1, 700):
        wide = resize_and_crop(np.full((side, side + 1, 3), 77, np.uint8), preprocessing)
        high = resize_and_crop(np.full((side + 1, side, 3), 77, np.uint8), preprocessing)
        assert (wide == 77).all() and (high == 77).all()


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


NON_SQUARE = Preprocessing(resize_size=(182, 109), crop_size=(160, 96))
ODD_SIZES = [(500, 375), (375, 500), (161, 97), (333, 200), (200, 333), (95, 61), (31, 47), (1, 1)]


def covering(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """timm's ResizeKeepRatio and the middle of its result, by Pillow, as int."""
    resize = ResizeKeepRatio(preprocessing.resize_size, interpolation=preprocessing.interpolation)
    return np.asarray(CenterCrop(preprocessing.input_shape)(resize(image))).astype(int)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.usefixtures("either_way")
def test_non_square_sizes_are_covered_as_by_timm(wide, interpolation):
    preprocessing = dataclasses.replace(NON_SQUARE, interpolation=interpolation)
    if wide:
        preprocessing = dataclasses.replace(
            preprocessing, resize_size=(131, 262), crop_size=(131, 250)
        )
    differences = []
    for seed, size in enumerate(ODD_SIZES):
        image = photo(*size, seed)
        ours = resize_and_crop(pixels_of(image), preprocessing)
        assert ours.shape == (*preprocessing.input_shape, 3)
        differences.append(np.abs(ours - covering(image, preprocessing)))
    assert np.max(differences) <= 2
    assert np.count_nonzero(differences) <= 0.01 * np.size(differences)


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.usefixtures("either_way")
def test_squash_resizes_to_a_rectangle(size):
    preprocessing = dataclasses.replace(NON_SQUARE, squash=True)
    image = photo(*size)
    rectangle = np.asarray(image.resize((109, 182), Image.Resampling.BILINEAR)).astype(int)
    ours = resize_and_crop(pixels_of(image), preprocessing)
    # (182 - 160) / 2 and (109 - 96) / 2, which is 6.5 and is rounded to even
    assert np.abs(ours - rectangle[11:171, 6:102]).max() <= 2


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.usefixtures("either_way")
def test_shorter_side_of_a_non_square_crop_is_as_in_torchvision(size):
    preprocessing = Preprocessing(resize_size=170, crop_size=(160, 96))
    image = photo(*size)
    theirs = np.asarray(CenterCrop((160, 96))(Resize(170)(image))).astype(int)
    assert np.abs(resize_and_crop(pixels_of(image), preprocessing) - theirs).max() <= 2


@pytest.mark.parametrize("resize_size", [256, (182, 239)], ids=str)
@pytest.mark.parametrize("size", [*ODD_SIZES, (3000, 1999), (1, 3000), (7, 2999)], ids=str)
@pytest.mark.usefixtures("either_way")
def test_any_size_becomes_a_non_square_crop(size, resize_size):
    preprocessing = Preprocessing(resize_size=resize_size, crop_size=(160, 224))
    cropped = resize_and_crop(pixels_of(photo(*size)), preprocessing)
    assert cropped.dtype == np.uint8
    assert cropped.shape == (160, 224, 3)


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (259, 257), (500, 375)], ids=str)
def test_floored_offset_is_bit_exact_without_cykooz(size, monkeypatch):
    monkeypatch.setattr(module, "rust_lib", None)
    image = photo(*size)
    width, height = (255 * side // min(size) for side in size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    crops: list[Any] = [224, (224, 192), 255]
    for crop in crops:
        preprocessing = Preprocessing(
            resize_size=255, crop_size=crop, interpolation="bicubic", crop_offset="floor"
        )
        crop_height, crop_width = preprocessing.input_shape
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        expected = resized[top : top + crop_height, left : left + crop_width]
        assert np.array_equal(resize_and_crop(pixels_of(image), preprocessing), expected)


@needs_cykooz
@pytest.mark.parametrize("size", [(301, 200), (200, 301), (259, 257), (500, 375)], ids=str)
def test_floored_offset_moves_the_crop_of_cykooz(size):
    image = photo(*size)
    width, height = (255 * side // min(size) for side in size)
    top, left = (height - 224) // 2, (width - 224) // 2
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    preprocessing = Preprocessing(resize_size=255, crop_size=224, crop_offset="floor")
    ours = resize_and_crop(pixels_of(image), preprocessing)
    assert np.abs(ours - resized[top : top + 224, left : left + 224]).max() <= 2


@pytest.mark.parametrize("resize_size", [(182, 109), 182])
def test_scaled_decoding_keeps_twice_the_longer_target(resize_size):
    preprocessing = Preprocessing(resize_size=resize_size, crop_size=(160, 96), decode="scaled")
    assert preprocessing.min_decoded_side == 364
