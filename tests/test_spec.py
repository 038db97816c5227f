from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from imagevec import ImageVectorizer, OptionError, Preprocessing
from imagevec.options import DEFAULTS, FORMATS
from imagevec.plan import make_plan
from imagevec.spec import ExecutionOptions, FeatureSpec
from tests.helpers.options import WRONG_OPTIONS, option_id
from tests.helpers.pipeline import execution_options

MODEL: dict[str, Any] = {"model": "squeezenet1_1", "weights": "random", "engine": "torch"}


@pytest.fixture(scope="module")
def spec() -> FeatureSpec:
    return make_plan(**MODEL).spec


@pytest.mark.parametrize("frozen", [FeatureSpec, ExecutionOptions, Preprocessing])
def test_values_are_frozen(frozen):
    assert frozen.__dataclass_params__.frozen


def test_a_spec_survives_json(spec):
    assert FeatureSpec.from_json(spec.to_json()) == spec


def test_a_spec_of_several_layers_survives_json(spec):
    layers = dataclasses.replace(spec, layer=("pooled", "a.b"), num_features=(8, 3))
    assert FeatureSpec.from_json(layers.to_json()) == layers
    assert list(layers.layer_sizes.items()) == [("pooled", 8), ("a.b", 3)]
    assert spec.layer_sizes is None


def test_a_spec_of_a_non_square_input_survives_json(spec):
    preprocessing = Preprocessing(resize_size=(182, 109), crop_size=(160, 96))
    wide = dataclasses.replace(spec, preprocessing=preprocessing)
    assert FeatureSpec.from_json(wide.to_json()) == wide
    assert wide.fingerprint != spec.fingerprint


def test_equal_sides_are_a_square():
    sizes: Any = {"resize_size": [256, 256], "crop_size": (np.int64(224), 224)}
    preprocessing = Preprocessing(**sizes)
    assert preprocessing == Preprocessing()
    assert (preprocessing.resize_size, preprocessing.crop_size) == (256, 224)
    assert preprocessing.input_shape == (224, 224)
    assert Preprocessing(crop_size=(160, 96)).input_shape == (160, 96)


@pytest.mark.parametrize("option", ["crop_size", "resize_size"])
@pytest.mark.parametrize("size", [0, -1, True, 2.5, "224", None, (), (1,), (1, 2, 3), (0, 2)])
def test_a_wrong_size_is_refused(option, size):
    with pytest.raises(OptionError, match=f"{option}=.* is not valid: use an integer"):
        Preprocessing(**{option: size})


@pytest.mark.parametrize(
    ("resize_size", "crop_size"), [(223, 224), ((182, 95), (160, 96)), (160, (160, 161))]
)
def test_a_resize_below_the_crop_is_refused(resize_size, crop_size):
    with pytest.raises(OptionError, match="use at least crop_size="):
        Preprocessing(resize_size=resize_size, crop_size=crop_size)


@pytest.mark.parametrize(
    ("resize_size", "crop_size", "input_size", "resized"),
    [
        (256, 224, 320, 365),  # 365.7
        (232, 224, 112, 116),
        (232, 224, (160, 96), (165, 99)),  # 165.7 and 99.4
        ((165, 99), (160, 96), (320, 192), (330, 198)),
        ((165, 99), (160, 96), 160, (165, 165)),
        (224, 224, 225, 225),
        (170, (160, 96), (160, 96), 170),
    ],
)
def test_another_input_size_keeps_the_ratio(resize_size, crop_size, input_size, resized):
    preprocessing = Preprocessing(resize_size=resize_size, crop_size=crop_size, std=(1, 1, 1))
    expected = dataclasses.replace(preprocessing, resize_size=resized, crop_size=input_size)
    assert preprocessing.with_input_size(input_size) == expected


def test_a_fingerprint_stays_what_it_was():
    weights = "sha256:" + "0" * 64
    spec = FeatureSpec("resnet50", weights, "pooled", 2048, Preprocessing(), "float32", False)
    assert spec.fingerprint == "b5d7556550dedaed"


def test_options_of_decoding_stand_in_the_spec_only_if_they_are_given(spec):
    assert "background" not in spec.to_json()
    assert "value_range" not in spec.to_json()
    given = Preprocessing(background="#fff", value_range=(0, 4095))
    other = dataclasses.replace(spec, preprocessing=given)
    assert FeatureSpec.from_json(other.to_json()) == other
    written = json.loads(other.to_json())["preprocessing"]
    assert (written["background"], written["value_range"]) == ("#ffffff", [0.0, 4095.0])


@pytest.mark.parametrize("colour", ["#fff", "#FFFFFF", "rgb(255, 255, 255)", (255, 255, 255)])
def test_one_colour_has_one_fingerprint(spec, colour):
    white = make_plan(**MODEL, background="white").spec
    assert make_plan(**MODEL, background=colour).spec.fingerprint == white.fingerprint
    assert white.fingerprint != spec.fingerprint
    assert white.fingerprint != make_plan(**MODEL, background="#fffffe").spec.fingerprint


def test_one_range_has_one_fingerprint(spec):
    integers = make_plan(**MODEL, value_range=(0, 4095)).spec
    floats = make_plan(**MODEL, value_range=[np.float64(0), 4095.0]).spec
    assert integers.fingerprint == floats.fingerprint != spec.fingerprint
    assert integers.fingerprint != make_plan(**MODEL, value_range=(0, 4096)).spec.fingerprint


def test_a_fingerprint_is_of_the_content(spec):
    assert spec.fingerprint == FeatureSpec.from_json(spec.to_json()).fingerprint
    assert len(spec.fingerprint) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"model": "squeezenet1_0"},
        {"weights": "sha256:" + "0" * 64},
        {"layer": "logits"},
        {"layer": ("pooled",), "num_features": (512,)},
        {"num_features": 1000},
        {"preprocessing": Preprocessing(crop_size=32)},
        {"preprocessing": Preprocessing(background="black")},
        {"preprocessing": Preprocessing(value_range=(0, 1))},
        {"precision": "bfloat16"},
        {"normalize": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_numbers_changes_the_fingerprint(spec, change):
    assert dataclasses.replace(spec, **change).fingerprint != spec.fingerprint


@pytest.mark.parametrize(
    "option",
    [
        {"batch_size": 3},
        {"device": "cpu"},
        {"max_pixels": 10},
        {"formats": ["PNG"]},
        {"on_error": "raise"},
        {"output": "struct"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_how_it_runs_does_not_change_the_fingerprint(spec, option):
    assert make_plan(**MODEL, **option).spec.fingerprint == spec.fingerprint


def test_the_defaults_are_the_documented_ones():
    documented = {
        "model": "resnet50",
        "weights": "DEFAULT",
        "layer": "pooled",
        "normalize": False,
        "precision": "float32",
        "engine": "auto",
        "device": "auto",
        "batch_size": "auto",
        "max_pixels": 89_478_485,
        "formats": FORMATS,
        "decode": "exact",
        "on_error": "null",
        "output": "array",
    }
    assert documented.items() <= DEFAULTS.items()
    assert FORMATS == ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")


def test_the_default_preprocessing_is_torchvisions():
    preset = ImageClassification(crop_size=224)
    ours = Preprocessing()
    assert [ours.resize_size, ours.crop_size] == [*preset.resize_size, *preset.crop_size]
    assert (list(ours.mean), list(ours.std)) == (preset.mean, preset.std)
    assert InterpolationMode(ours.interpolation) == preset.interpolation


def test_one_format_may_be_given_alone():
    assert execution_options(formats="PNG").formats == ("PNG",)


@pytest.mark.parametrize(("option", "fix"), WRONG_OPTIONS, ids=option_id)
def test_a_wrong_option_is_refused_with_the_nearest_valid_choice(option, fix):
    with pytest.raises(OptionError) as refused:
        ImageVectorizer(**{**MODEL, **option})
    assert fix in str(refused.value)
    assert next(iter(option)) in str(refused.value)


@pytest.mark.parametrize(
    ("field", "fix"),
    [
        ({"interpolation": "nearest"}, "did you mean 'bilinear'"),
        ({"crop_size": 0}, "at least 1"),
        ({"resize_size": 200}, "at least crop_size=224"),
        ({"mean": (0.5,)}, "a tuple of 3 numbers"),
        ({"std": (0.5, 0.5)}, "a tuple of 3 numbers"),
        ({"mean": 0.5}, "a tuple of 3 numbers"),
        ({"mean": ("0", 0.0, 0.0)}, "a tuple of 3 numbers"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "a tuple of 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "numbers above 0"),
        ({"resize_size": "256"}, "an integer"),
        ({"resize_size": 256.5}, "an integer"),
    ],
    ids=lambda field: next(iter(field)) if isinstance(field, dict) else "",
)
def test_wrong_preprocessing_is_refused(field, fix):
    with pytest.raises(OptionError, match=fix):
        Preprocessing(**field)
