from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.transforms import InterpolationMode, functional

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
    WeightsError,
    list_models,
)
from imagevec.images.preprocess import resize_and_crop
from imagevec.models.classifier import find_classifier
from imagevec.models.features import example_input
from imagevec.models.registry import find_source
from imagevec.models.state_dict import no_memory
from imagevec.spec import height_and_width
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
_MAX_GFLOPS = 16  # a plan takes five forward passes


def gflops(name: str) -> float:
    weights: Any = torchvision.models.get_model_weights(name)
    cost: float = weights.DEFAULT.meta["_ops"]
    return cost


def often_or_rarely(name: str) -> Any:
    """The models that are not of ``ONE_OF_EACH_FAMILY`` are tested by ``make test-models``."""
    marks = [] if name in ONE_OF_EACH_FAMILY else [pytest.mark.all_models]
    return pytest.param(name, marks=marks)


TESTED = [often_or_rarely(name) for name in ALL]
PLANNED = [
    often_or_rarely(name)
    for name in ALL
    if name in ONE_OF_EACH_FAMILY or gflops(name) <= _MAX_GFLOPS
]
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


@pytest.mark.parametrize("name", PLANNED)
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


@pytest.mark.parametrize("name", TESTED)
def test_the_last_linear_layer_is_the_classifier(name):
    source = find_source(name)
    preprocessing = source.preprocessing(None)
    with no_memory():
        model = source.build(preprocessing).to("meta").eval()
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    images = example_input(preprocessing, 1).to("meta")
    assert find_classifier(model, images) == (linear[-1] if linear else None)


def test_squeezenets_pooled_layer_is_its_pooled_features(tmp_path):
    weights = tmp_path / "weights.pth"
    model: Any = saved(torchvision.models.squeezenet1_1, weights)
    with torch.inference_mode():
        expected = model.features(model_input(Preprocessing())).mean((2, 3))[0]
    vector = vector_of(PNG, model="squeezenet1_1", weights=str(weights))
    assert cosine(vector, expected) >= 0.9999


@pytest.mark.parametrize(
    ("name", "input_size", "resize_size"),
    [
        ("resnet18", 224, 256),
        ("resnet18", 112, 128),
        ("resnet18", 320, 365),
        ("resnet18", (160, 96), (182, 109)),
        ("resnet50", (160, 96), (165, 99)),
        ("vit_b_16", 320, 365),
    ],
)
def test_resize_of_another_size_keeps_the_ratio_of_the_preset(name, input_size, resize_size):
    source = find_source(name)
    own = source.preprocessing(None)
    resized = source.resized(own, input_size)
    assert (resized.resize_size, resized.crop_size) == (resize_size, input_size)
    assert (resized.mean, resized.interpolation) == (own.mean, own.interpolation)


def transformed(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """An image that covers ``resize_size``, and its crop, by torchvision on a Pillow image."""
    height, width = height_and_width(preprocessing.resize_size)
    ratio = min(image.height / height, image.width / width)
    size = [round(image.height / ratio), round(image.width / ratio)]
    if isinstance(preprocessing.resize_size, int):
        size = [preprocessing.resize_size]
    resized = functional.resize(image, size, InterpolationMode(preprocessing.interpolation))
    pixels = functional.to_tensor(functional.center_crop(resized, list(preprocessing.input_shape)))
    return functional.normalize(pixels, list(preprocessing.mean), list(preprocessing.std))


@pytest.mark.parametrize(
    ("name", "input_size", "options", "engine"),
    [
        ("resnet18", (160, 96), {}, "openvino"),
        ("resnet18", 320, {}, "torch"),
        ("mobilenet_v3_small", (97, 161), {}, "openvino"),
        ("mobilenet_v3_small", (97, 161), {}, "torch"),
        ("swin_t", (160, 96), {}, "openvino"),
        ("swin_t", (160, 96), {}, "torch"),
        ("maxvit_t", 448, {"input_size": (448, 448)}, "torch"),
        ("vit_b_32", 160, {"image_size": 160}, "openvino"),
        ("vit_b_32", 160, {"image_size": 160}, "torch"),
    ],
    ids=str,
)
def test_features_of_another_size_are_torchvisions(name, input_size, options, engine, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    weights = tmp_path / "weights.pth"
    get_model: Any = functools.partial(torchvision.models.get_model, name, weights=None)
    saved(get_model, weights)
    tensors = torch.load(weights)
    if "encoder.pos_embedding" in tensors:
        tensors["encoder.pos_embedding"] *= 50  # positions of random weights count for little
        torch.save(tensors, weights)
        tensors = interpolate_embeddings(input_size, 32, OrderedDict(tensors))
    model = get_model(**options)
    model.load_state_dict(tensors)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs: list[torch.Tensor] = []
    layers[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    images = [photo(*size, seed) for seed, size in enumerate([(201, 333), (640, 427), (97, 61)])]
    plan, engine_ = plan_and_engine(
        model=name, weights=str(weights), input_size=input_size, engine=engine
    )
    preprocessing = plan.spec.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    with torch.inference_mode():
        model.eval()(torch.stack([transformed(image, preprocessing) for image in images]))
    pixels = [resize_and_crop(pixels_of(image), preprocessing) for image in images]
    together = engine_(np.stack(pixels))
    for vector, alone, expected in zip(together, pixels, inputs[0], strict=True):
        assert cosine(vector, expected) >= 0.9999
        assert cosine(engine_(np.stack([alone]))[0], expected) >= 0.9999


@pytest.mark.parametrize(
    ("name", "input_size", "reason"),
    [
        ("vit_b_32", (160, 96), "only takes squares, such as 224; timm's"),
        ("vit_b_32", 100, "cannot run it .*indivisible by patch size.*; its own size is 224"),
        ("maxvit_t", (160, 96), "cannot run it .*; its own size is 224"),
        ("vgg11", 16, "cannot run it .*; its own size is 224"),
    ],
)
def test_a_size_that_a_model_does_not_take_is_refused(name, input_size, reason):
    with pytest.raises(OptionError, match=f"input_size=.* is not valid: '{name}' {reason}"):
        ImageVectorizer(**RANDOM, model=name, input_size=input_size)


def test_position_embeddings_are_only_resampled_for_a_chosen_size(tmp_path, monkeypatch):
    """``vit_b_16`` has weights for 224 and 384 pixels, which are told apart by their digest."""
    source: Any = find_source("vit_b_16")
    model = torchvision.models.VisionTransformer(224, 16, 1, 1, hidden_dim=8, mlp_dim=8)
    tensors = {"encoder.pos_embedding": torch.rand(1, 24 * 24 + 1, 8)}  # for 384 pixels
    url = source.weights_enum.IMAGENET1K_SWAG_E2E_V1.url
    digest = url.rpartition("-")[2].removesuffix(".pth").ljust(64, "0")
    for known, tokens in ((digest, 14 * 14 + 1), ("0" * 64, 24 * 24 + 1)):
        monkeypatch.setattr("imagevec.models.torchvision.digest_of", lambda path, is_=known: is_)
        fitted = source.fitted(tensors, model, Preprocessing(), tmp_path)
        assert fitted["encoder.pos_embedding"].shape == (1, tokens, 8)
    assert tensors["encoder.pos_embedding"].shape == (1, 24 * 24 + 1, 8)


def test_weights_for_another_size_do_not_fit(tmp_path):
    weights = tmp_path / "weights.pth"
    saved(functools.partial(torchvision.models.vit_b_32, image_size=96), weights)
    with pytest.raises(WeightsError, match="pos_embedding"):
        ImageVectorizer(model="vit_b_32", weights=str(weights), engine="torch")
    resized = ImageVectorizer(model="vit_b_32", weights=str(weights), input_size=96, engine="torch")
    assert resized.extract_features(PNG) is not None
