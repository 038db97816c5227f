from __future__ import annotations

import functools
import os
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from imagevec import (
    ImageVectorizer,
    Preprocessing,
    list_models,
)
from imagevec.models.registry import find_source
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import (
    pixels_of,
    plan_and_engine,
    preprocess,
    saved,
    vector_of,
)

pytestmark = pytest.mark.models

ALL = list_models()
ONE_OF_EACH_FAMILY = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_16",
    "wide_resnet50_2",
]
TESTED = ALL if os.environ.get("IMAGEVEC_TEST_ALL_MODELS") else ONE_OF_EACH_FAMILY
IMAGE = photo(120, 90)
PNG = encode(IMAGE)
RANDOM: dict[str, Any] = {"weights": "random", "engine": "torch"}


def model_input(preprocessing: Preprocessing) -> torch.Tensor:
    """float32 ``(1, 3, S, S)`` of ``IMAGE``."""
    return preprocess(pixels_of(IMAGE), preprocessing)[None]


def test_every_classification_model_of_torchvision_is_listed():
    assert set(torchvision.models.list_models(module=torchvision.models)) <= set(ALL)
    assert sorted(ALL) == ALL


@pytest.mark.parametrize("name", ALL)
def test_preprocessing_is_the_preset_of_the_weights(name):
    ours = find_source(name).preprocessing(None)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert [ours.resize_size, ours.crop_size] == [*preset.resize_size, *preset.crop_size]
    assert (list(ours.mean), list(ours.std)) == (list(preset.mean), list(preset.std))
    assert ours.interpolation == preset.interpolation.value


@pytest.mark.parametrize(("version", "resize_size"), [("V1", 256), ("V2", 232)])
def test_preprocessing_follows_the_digest_of_the_weights(version, resize_size):
    source: Any = find_source("resnet50")
    file = source.weights_enum[f"IMAGENET1K_{version}"].url.rpartition("-")[2]
    digest = file.removesuffix(".pth").ljust(64, "0")
    assert source.preprocessing(digest).resize_size == resize_size


@pytest.mark.parametrize("name", TESTED)
def test_every_model_yields_what_it_declares(name):
    plan, engine = plan_and_engine(model=name, weights="random")
    preprocessing = plan.spec.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    height, width = preprocessing.input_shape
    vectors = engine(pixels_of(photo(width, height))[None])
    assert vectors.dtype == np.float32
    assert vectors.shape == (1, plan.spec.num_features)
    assert np.isfinite(vectors).all()
    assert vectors.std() > 0
    assert len(cloudpickle.dumps(plan)) < 100_000
    assert cloudpickle.loads(cloudpickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("name", "num_features"),
    [
        ("resnet50", 2048),
        ("vgg16", 4096),
        ("mobilenet_v3_large", 1280),
        ("squeezenet1_1", 512),
        ("vit_b_16", 768),
        ("alexnet", 4096),
    ],
)
def test_num_features_are_the_known_ones(name, num_features):
    assert ImageVectorizer(model=name, **RANDOM).num_features == num_features


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_logits_are_the_classifiers_output(name, tmp_path):
    weights = tmp_path / "weights.pth"
    model = saved(functools.partial(torchvision.models.get_model, name), weights)
    vector = vector_of(PNG, model=name, weights=str(weights), layer="logits")
    with torch.inference_mode():
        expected = model(model_input(find_source(name).preprocessing(None)))[0]
    assert len(vector) == 1000
    assert cosine(vector, expected) >= 0.9999


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "alexnet", "efficientnet_b0", "googlenet"]
)
def test_pooled_is_the_input_of_the_last_linear_layer(name, tmp_path):
    weights = tmp_path / "weights.pth"
    build = functools.partial(torchvision.models.get_model, name)
    if name == "googlenet":
        build = functools.partial(build, transform_input=True, init_weights=False)
    model = saved(build, weights)
    inputs = []
    last_linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last_linear.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.inference_mode():
        model(model_input(find_source(name).preprocessing(None)))
    vector = vector_of(PNG, model=name, weights=str(weights))
    assert cosine(vector, inputs[0][0]) >= 0.9999


def test_squeezenets_pooled_layer_is_its_pooled_features(tmp_path):
    weights = tmp_path / "weights.pth"
    model: Any = saved(torchvision.models.squeezenet1_1, weights)
    with torch.inference_mode():
        expected = model.features(model_input(Preprocessing())).mean((2, 3))[0]
    vector = vector_of(PNG, model="squeezenet1_1", weights=str(weights))
    assert cosine(vector, expected) >= 0.9999
