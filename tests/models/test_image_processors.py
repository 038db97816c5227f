"""Image processors of transformers, and the preprocessing that is made of their files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from imagevec import OptionError, Preprocessing, WeightsError
from imagevec.engines.torch_engine import normalize
from imagevec.images.preprocess import resize_and_crop
from imagevec.models.image_processors import KINDS, read, to_preprocessing
from tests.helpers.images import photo

transformers = pytest.importorskip("transformers")

SIZES = [(120, 91), (77, 133), (64, 64), (33, 200), (301, 302)]

CASES: list[dict[str, Any]] = [
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 64}},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 48, "resample": 3},
    {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 40, "width": 40}},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 48},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 57}, "crop_size": 40},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 37, "width": 37}},
    {"image_processor_type": "DeiTImageProcessor"},
    {"image_processor_type": "BeitImageProcessor", "reduce_labels": False},
    {"image_processor_type": "BeitImageProcessor", "size": 256, "do_center_crop": True},
    {"image_processor_type": "BlipImageProcessor"},
    {"image_processor_type": "ChineseCLIPImageProcessor"},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
    {"image_processor_type": "ConvNextImageProcessor", "size": 224, "crop_pct": 0.95},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_pad": None},
    {"image_processor_type": "LevitImageProcessor"},
    {"image_processor_type": "LevitImageProcessor", "size": {"height": 224, "width": 224}},
    {"image_processor_type": "MobileNetV1ImageProcessor"},
    {"image_processor_type": "MobileNetV2ImageProcessor"},
    {
        "image_processor_type": "MobileViTImageProcessor",
        "size": 288,
        "do_flip_channel_order": False,
    },
    {"image_processor_type": "PoolFormerImageProcessor"},
    {"image_processor_type": "PoolFormerImageProcessor", "size": 224, "crop_pct": 0.95},
    {"image_processor_type": "PvtImageProcessor"},
    {"image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}},
    {"image_processor_type": "EfficientNetImageProcessor", "resample": 2},
    {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}
    | {"include_top": False, "rescale_factor": 1 / 127.5},
    {"image_processor_type": "EfficientNetImageProcessor", "size": 64, "do_center_crop": True}
    | {"crop_size": {"height": 50, "width": 50}},
    {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    {"image_processor_type": "ViTImageProcessor", "do_rescale": False}
    | {"image_mean": [127.5] * 3, "image_std": [60.0] * 3},
    {"image_processor_type": "ViTImageProcessor", "rescale_factor": 1 / 127.5},
    {"image_processor_type": "ViTImageProcessor", "image_mean": 0.4, "image_std": 0.3},
    {"image_processor_type": "ViTImageProcessor", "image_mean": [0.4], "image_std": [0.3] * 3},
    # Steps that a processor does not have
    {"image_processor_type": "ViTImageProcessor", "rescale_offset": True, "include_top": True},
    {"image_processor_type": "MobileViTImageProcessor", "size": 288, "do_flip_channel_order": False}
    | {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.2] * 3},
    {"image_processor_type": "SegformerImageProcessor", "size": 64, "do_center_crop": True}
    | {"crop_size": 48},
    # null is a step that is not done
    {"image_processor_type": "ViTImageProcessor", "do_normalize": None},
    {"image_processor_type": "ViTImageProcessor", "do_rescale": None},
    {"image_processor_type": "DeiTImageProcessor", "size": 64, "do_center_crop": None},
    {"image_processor_type": "PoolFormerImageProcessor", "size": 64, "crop_pct": None}
    | {"crop_size": 48},
    {"image_processor_type": "CLIPImageProcessor", "size": 64, "default_to_square": True}
    | {"crop_size": 48},
]


def theirs(config: dict[str, Any], folder: Any) -> Any:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("config", CASES, ids=str)
def test_pixels_equal_those_of_the_processor(config, tmp_path):
    processor = theirs(config, tmp_path)
    preprocessing = read(tmp_path)
    # The values are those of pixels from 0 to 255, divided by the standard deviation.
    unit = torch.tensor(preprocessing.std)[:, None, None] * 255
    for seed, size in enumerate(SIZES):
        image = photo(*size, seed=seed)
        pixels = resize_and_crop(np.array(image), preprocessing)
        ours = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], preprocessing)[0]
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        difference = ((ours - expected) * unit).abs()
        assert ours.shape == expected.shape
        # As between Pillow and torchvision; DINOv3's processor resizes floats and does not round.
        assert difference.max() <= (2.01 if preprocessing.interpolation == "bicubic" else 1.01)
        assert difference.mean() <= (0.3 if "DINOv3" in str(config) else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_the_class(kind):
    theirs = getattr(transformers, f"{kind}ImageProcessor")()
    for option, value in KINDS[kind].items():
        default = getattr(theirs, option)
        if isinstance(value, dict):
            default = {key: side for key, side in dict(default).items() if side is not None}
        assert (default or False) == value, option


def test_a_nested_configuration_comes_first(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "?"}')
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", "size": 40}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read(tmp_path).crop_size == 40
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 41}')
    assert read(tmp_path, lambda: "ViTImageProcessor").crop_size == 41


def test_the_crop_is_rounded_down():
    assert to_preprocessing({"image_processor_type": "CLIPImageProcessor"}) == Preprocessing(
        resize_size=224,
        crop_size=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        interpolation="bicubic",
        crop_offset="floor",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"the image processor \(unnamed\) is not supported; use BeitImageP"),
        (
            {"image_processor_type": "Siglip2ImageProcessor"},
            "the image processor Siglip2ImageProcessor is not supported; use BeitImage",
        ),
        (
            {"image_processor_type": "MobileViTImageProcessor"},
            r"MobileViTImageProcessor is not supported: it flips the channels to BGR",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "do_flip_channel_order": True},
            "ViTImageProcessor is not supported: it flips",
        ),
        (
            {"image_processor_type": "CLIPFeatureExtractor", "resample": 1},
            "CLIPImageProcessor is not supported: resample=1 is Lanczos",
        ),
        ({"image_processor_type": "ViTImageProcessor", "resample": 0}, "0 is nearest"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "does not resize"),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
            "it keeps the aspect ratio of images and does not crop them",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "crop_size": 300},
            "it pads images of {'shortest_edge': 224} to 300",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 224}},
            "its size is {'longest_edge': 224}",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "do_pad": True, "pad_size": 300},
            "it pads images to 300",
        ),
        (
            {
                "image_processor_type": "ViTImageProcessor",
                "auto_map": {"AutoImageProcessor": "a.B"},
            },
            "its code is in its folder",
        ),
        ({"image_processor_type": "ViTImageProcessor", "do_thumbnail": True}, "step do_thumbnail"),
        (
            {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 2},
            "not one number for each of 3 channels",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "image_std": ["1"] * 3},
            "not one number for each of 3 channels",
        ),
        ({"image_processor_type": "ViTImageProcessor", "image_std": 0}, r"std=.*above 0"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": None}, "its image_mean is No"),
        ({"image_processor_type": "ViTImageProcessor", "rescale_factor": "1"}, "'1', not a numb"),
        ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "crop_size is Non"),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": "a", "width": 1}},
            "ViTImageProcessor is not supported: it has a wrong number .*'a'",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 64, "crop_pct": None},
            "ConvNextImageProcessor is not supported: it has a wrong number",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "default_to_square": False, "size": 64},
            "it keeps the aspect ratio",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": 0},
            r"ViTImageP.*crop_size=\(0, 0\) is not",
        ),
    ],
    ids=str,
)
def test_refused_processors(config, message):
    with pytest.raises(OptionError, match=message):
        to_preprocessing(config)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(WeightsError, match="has no preprocessor_config.json, .*: copy the one"):
        read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(WeightsError, match="preprocessor_config.json is not valid JSON"):
        read(tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(WeightsError, match=f"{name} is not valid: it contains no JSON object"):
            read(tmp_path)
