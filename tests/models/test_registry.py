from __future__ import annotations

import functools
import os
import re

import cloudpickle
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from imagevec import (
    ImageVecError,
    ImageVectorizer,
    OptionError,
    Preprocessing,
    list_models,
    register_model,
)
from imagevec.models.entry import ModelSource
from imagevec.models.registry import find_source
from imagevec.options import ENGINES
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny, tiny_swin, tiny_vit
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import (
    pixels_of,
    plan_and_engine,
    preprocess,
    run_python,
    saved,
    vector_of,
)

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

RANDOM = {"weights": "random", "engine": "torch"}
INPUT_OF_32 = Preprocessing(resize_size=36, crop_size=32)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_model("tiny_vit", tiny_vit, preprocessing=INPUT_OF_32)
    register_model("tiny_swin", tiny_swin, preprocessing=INPUT_OF_32)


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
    source = find_source("resnet50")
    file = source.weights_enum[f"IMAGENET1K_{version}"].url.rpartition("-")[2]
    digest = file.removesuffix(".pth").ljust(64, "0")
    assert source.preprocessing(digest).resize_size == resize_size


@pytest.mark.parametrize("name", TESTED)
def test_every_model_yields_what_it_declares(name):
    plan, engine = plan_and_engine(model=name, weights="random")
    size = plan.spec.preprocessing.crop_size
    vectors = engine(pixels_of(photo(size, size))[None])
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


@pytest.mark.parametrize("factory", [tiny, tiny_vit, tiny_swin])
def test_pooled_feeds_a_factorys_last_linear_layer(factory, tmp_path):
    weights = tmp_path / "weights.pth"
    model = saved(factory, weights)
    name = {tiny: tiny, tiny_vit: "tiny_vit", tiny_swin: "tiny_swin"}[factory]
    vector = vector_of(PNG, model=name, weights=str(weights))
    logits = vector_of(PNG, model=name, weights=str(weights), layer="logits")
    last_linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    np.testing.assert_allclose(last_linear(torch.tensor(vector)).detach(), logits, rtol=1e-4)


def test_squeezenets_pooled_layer_is_its_pooled_features(tmp_path):
    weights = tmp_path / "weights.pth"
    model = saved(torchvision.models.squeezenet1_1, weights)
    with torch.inference_mode():
        expected = model.features(model_input(Preprocessing())).mean((2, 3))[0]
    vector = vector_of(PNG, model="squeezenet1_1", weights=str(weights))
    assert cosine(vector, expected) >= 0.9999


@pytest.mark.parametrize("layer", ["layer1", "layer3.0.conv1", "layer4", "avgpool"])
def test_a_spatial_layer_is_average_pooled(layer, tmp_path):
    weights = tmp_path / "weights.pth"
    model = saved(torchvision.models.resnet18, weights)
    extractor = create_feature_extractor(model, [layer])
    with torch.inference_mode():
        node = extractor(model_input(Preprocessing()))[layer]
    vector = vector_of(PNG, model="resnet18", weights=str(weights), layer=layer)
    assert cosine(vector, node.mean((2, 3))[0]) >= 0.9999


@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.encoder_layer_0", "encoder.ln"])
def test_a_token_layer_takes_the_class_token(layer, tmp_path):
    weights = tmp_path / "weights.pth"
    extractor = create_feature_extractor(saved(tiny_vit, weights), [layer])
    with torch.inference_mode():
        node = extractor(model_input(INPUT_OF_32))[layer]
    assert node.shape == (1, 17, 16)
    vector = vector_of(PNG, model="tiny_vit", weights=str(weights), layer=layer)
    assert cosine(vector, node[0, 0]) >= 0.9999


@pytest.mark.parametrize(
    ("layer", "channels_last"),
    [("features.0", True), ("features.1", True), ("norm", True), ("permute", False)],
)
def test_swins_channels_are_told_from_its_rows(layer, channels_last, tmp_path):
    weights = tmp_path / "weights.pth"
    extractor = create_feature_extractor(saved(tiny_swin, weights), [layer])
    with torch.inference_mode():
        node = extractor(model_input(INPUT_OF_32))[layer]
    expected = node.mean((1, 2) if channels_last else (2, 3))[0]
    vector = vector_of(PNG, model="tiny_swin", weights=str(weights), layer=layer)
    assert len(vector) == len(expected)
    assert cosine(vector, expected) >= 0.9999


def test_a_flat_layer_is_taken_as_it_is(tmp_path):
    weights = tmp_path / "weights.pth"
    model = saved(torchvision.models.alexnet, weights)
    extractor = create_feature_extractor(model, ["classifier.1"])
    with torch.inference_mode():
        node = extractor(model_input(Preprocessing()))["classifier.1"]
    vector = vector_of(PNG, model="alexnet", weights=str(weights), layer="classifier.1")
    assert cosine(vector, node[0]) >= 0.9999


@pytest.mark.parametrize("layer", ["getattr", "getitem"])
def test_a_layer_that_is_no_tensor_is_refused(layer):
    with pytest.raises(OptionError, match="not a tensor"):
        ImageVectorizer(model="tiny_vit", layer=layer, normalize=True, **RANDOM)


def test_a_layer_of_a_model_that_cannot_be_traced_is_refused():
    class Branching(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) if images.sum() > 0 else super().forward(-images)

    assert len(vector_of(PNG, model=Branching, weights="random")) == 8
    with pytest.raises(OptionError, match="layer='conv'"):
        ImageVectorizer(model=Branching, layer="conv", **RANDOM)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("resnet18", ("layer3", "pooled", "logits", "layer1.0.bn2", "fc")),
        ("squeezenet1_1", ("features.3", "logits", "features", "pooled")),
        ("tiny_vit", ("pooled", "encoder.layers.encoder_layer_0")),
        ("tiny_swin", ["features.1", "permute", "pooled"]),
        (tiny, ("conv", "relu", "pooled")),
    ],
    ids=["resnet18", "squeezenet1_1", "tiny_vit", "tiny_swin", "tiny"],
)
def test_several_layers_are_the_same_as_each_alone(model, layers, engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    options = {"model": model, "weights": "random", "engine": engine}
    vectorizer = ImageVectorizer(**options, layer=layers)
    vectors = vectorizer.extract_features(PNG)
    assert list(vectors) == list(vectorizer.num_features) == list(layers)
    for layer, vector in vectors.items():
        alone = np.array(vector_of(PNG, **{**options, "engine": "torch"}, layer=layer))
        assert len(vector) == vectorizer.num_features[layer]
        np.testing.assert_allclose(vector, alone, atol=1e-4 * np.abs(alone).max())


def test_names_of_the_same_node_give_the_same_vector():
    layers = ("layer4", "layer4.1", "layer4.1.relu_1")
    vectors = vector_of(PNG, model="resnet18", weights="random", layer=layers)
    assert vectors["layer4"] == vectors["layer4.1"] == vectors["layer4.1.relu_1"]


def test_an_in_place_operation_does_not_reach_the_layer_before_it():
    vectors = vector_of(
        PNG, model="alexnet", weights="random", layer=("classifier.1", "classifier.2")
    )
    before, after = (np.array(vector) for vector in vectors.values())
    assert before.min() < 0
    np.testing.assert_array_equal(np.maximum(before, 0), after)


def test_the_layers_of_a_model_that_cannot_be_traced_are_refused():
    class Branching(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) if images.sum() > 0 else super().forward(-images)

    with pytest.raises(OptionError, match=r"layer=\('pooled', 'logits'\).*'logits' alone"):
        ImageVectorizer(model=Branching, layer=("pooled", "logits"), **RANDOM)


def test_a_backbone_without_a_classifier_is_its_pooled_layer():
    def backbone() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    vectors = vector_of(PNG, model=backbone, weights="random", layer=("0", "pooled"))
    assert vectors["0"] == vectors["pooled"]


TIMM_WITH_WEIGHTS = ["tf_efficientnet_lite0", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", [*TIMM_WITH_WEIGHTS, "coat_lite_medium_384", "resnet18.a1_in1k"])
@pytest.mark.parametrize("size", [(500, 375), (240, 320), (900, 100)], ids=str)
def test_timms_preprocessing_is_its_evaluation_transform(name, size):
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config, is_training=False)
    image = photo(*size)
    preprocessing = find_source(f"timm/{name}").preprocessing(None)
    ours = preprocess(pixels_of(image), preprocessing)
    assert cosine(ours.flatten(), transform(image).flatten()) >= 0.9999


@pytest.mark.parametrize("name", TIMM_WITH_WEIGHTS)
def test_timms_features_are_the_ones_of_no_classes(name, tmp_path):
    timm = pytest.importorskip("timm")
    weights = tmp_path / "weights.pth"
    saved(functools.partial(timm.create_model, name), weights)
    headless = timm.create_model(name, num_classes=0).eval()
    headless.load_state_dict(torch.load(weights), strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(headless))
    with torch.inference_mode():
        expected = headless(transform(IMAGE)[None])[0]
    vectorizer = ImageVectorizer(model=f"timm/{name}", weights=str(weights), engine="torch")
    assert vectorizer.num_features == headless.num_features == len(expected)
    assert cosine(vectorizer.extract_features(PNG), expected) >= 0.9999


def test_timms_layers_are_the_same_as_each_alone():
    pytest.importorskip("timm")
    options = {"model": "timm/vit_tiny_patch16_224", "weights": "random"}
    layers = ("blocks.2", "pooled", "logits")
    for layer, vector in vector_of(PNG, **options, layer=layers).items():
        alone = vector_of(PNG, **options, layer=layer)
        np.testing.assert_allclose(vector, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("name", "layer", "pool"),
    [
        ("tf_efficientnet_lite0", "blocks.2", lambda node: node.mean((2, 3))),
        ("swin_tiny_patch4_window7_224", "layers.1", lambda node: node.mean((1, 2))),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj", lambda node: node.mean((2, 3))),
        ("vit_tiny_patch16_224", "blocks.1", lambda node: node[:, 0]),
        ("vit_tiny_patch16_224", "patch_embed", lambda node: node.mean(1)),
        ("xcit_nano_12_p16_224", "blocks.1", lambda node: node.mean(1)),
        ("mixer_s32_224", "blocks.1", lambda node: node.mean(1)),
        ("vit_medium_patch16_reg4_gap_256", "blocks.1", lambda node: node[:, 4:].mean(1)),
    ],
    ids=[
        "not_to_trace",
        "channels_last",
        "channels_first",
        "class_token",
        "before_the_class_token",
        "class_token_of_the_last_blocks",
        "no_class_token",
        "registers",
    ],
)
def test_timms_layers_are_pooled_as_their_shape_says(name, layer, pool, engine, tmp_path):
    timm = pytest.importorskip("timm")
    if engine == "openvino":
        pytest.importorskip("openvino")
    weights = tmp_path / "weights.pth"
    model = saved(functools.partial(timm.create_model, name), weights)
    nodes = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: nodes.append(out))
    source = find_source(f"timm/{name}")
    with torch.inference_mode():
        model(model_input(source.preprocessing(None)))
    options = {"model": source.name, "weights": str(weights), "engine": engine}
    vector = vector_of(PNG, **options, layer=(layer, "pooled"))[layer]
    (expected,) = pool(nodes[0])
    assert len(vector) == len(expected)
    assert cosine(vector, expected) >= 0.9999


@pytest.mark.parametrize("name", ["deepseek_vit_412m", "vit_base_patch16_sapiens2"])
def test_a_data_config_that_is_not_supported_is_refused(name):
    pytest.importorskip("timm")
    with pytest.raises(OptionError, match=f"data config of 'timm/{name}' is not supported"):
        find_source(f"timm/{name}").preprocessing(None)


class Callable:
    def __call__(self) -> nn.Module:
        return Tiny()


@pytest.mark.parametrize(
    "factory",
    [tiny, Tiny, lambda: Tiny(), functools.partial(tiny), Callable()],
    ids=["function", "class", "lambda", "partial", "object"],
)
def test_a_factory_is_any_callable_that_makes_a_model(factory):
    vectorizer = ImageVectorizer(model=factory, **RANDOM)
    assert vectorizer.num_features == len(vectorizer.extract_features(PNG)) == 8


def test_a_factory_keeps_the_weights_that_it_sets():
    def all_ones() -> nn.Module:
        model = Tiny()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)
        return model

    white = encode(Image.new("RGB", (50, 50), (255, 255, 255)))
    pixel = (1 - torch.tensor(Preprocessing().mean)) / torch.tensor(Preprocessing().std)
    vector = vector_of(white, model=all_ones)
    np.testing.assert_allclose(vector, [0.01 * (25 * pixel.sum() + 1)] * 8, rtol=1e-4)


def test_a_backbone_without_a_classifier_is_taken_whole():
    def backbone() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    assert ImageVectorizer(model=backbone, **RANDOM).num_features == 3


@pytest.mark.parametrize(
    ("factory", "fragment"),
    [
        (lambda: "no model", "returned str, not a torch.nn.Module"),
        (lambda: nn.Identity(), "not a tensor (N, D)"),
        (lambda: nn.Conv2d(3, 4, 3), "not a tensor (N, D)"),
    ],
    ids=["string", "identity", "convolution"],
)
def test_a_factory_of_something_else_is_refused(factory, fragment):
    with pytest.raises(OptionError, match=re.escape(fragment)):
        ImageVectorizer(model=factory, **RANDOM)


def test_a_live_model_is_refused_with_the_fix():
    with pytest.raises(OptionError, match="give a zero-argument factory"):
        ImageVectorizer(model=Tiny(), **RANDOM)


def test_a_registered_model_is_known_by_its_name():
    register_model("seven", tiny, preprocessing=Preprocessing(resize_size=7, crop_size=7))
    assert "seven" in list_models()
    plan = make_plan(model="seven", **RANDOM)
    assert plan.spec.model == "seven"
    assert plan.spec.preprocessing.crop_size == 7
    assert plan.spec.num_features == 8


@pytest.mark.parametrize("name", ["resnet50", "twice", "timm/anything"])
def test_a_name_is_registered_once(name):
    if "twice" not in list_models():
        register_model("twice", tiny)
    with pytest.raises(OptionError, match=f"{name}' is taken"):
        register_model(name, tiny)


def test_what_is_registered_is_a_factory():
    with pytest.raises(ImageVecError, match="function"):
        register_model("live", Tiny())
    with pytest.raises(OptionError, match="a function without arguments"):
        register_model("text", "resnet50")
    assert not {"live", "text"} & set(list_models())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet5", "'resnet50'"),
        ("mobilenetv3_large", "'mobilenet_v3_large'"),
        ("vit_b16", "'vit_b_16'"),
        ("tiny_vt", "'tiny_vit'"),
        ("timm/vit_tiny_patch_16_224", "'timm/vit_tiny_patch16_224'"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name, nearest):
    with pytest.raises(OptionError) as refused:
        find_source(name).check("pooled")
    assert repr(name) in str(refused.value)
    assert nearest in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "the model name '' is not valid"),
        (7, {}, "the model name 7 is not valid"),
        ("wrong preprocessing", {"preprocessing": {}}, "give an imagevec.Preprocessing"),
    ],
)
def test_a_wrong_registration_is_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        register_model(name, tiny, **options)
    assert name not in list_models()


def test_a_source_answers_everything():
    declared = {name for name in vars(ModelSource) if not name.startswith("_")}
    assert len(declared) == 12
    for model in ("resnet50", "timm/resnet18", "tiny_vit", tiny):
        source = find_source(model)
        assert all(hasattr(source, name) for name in declared)
        assert set(source.backends) <= set(ENGINES)


def test_finding_a_source_imports_no_pytorch():
    printed = run_python("""
import sys
from imagevec.models.entry import ModelSource
from imagevec.models.registry import find_source
from imagevec.options import ENGINES
print([find_source(name).name for name in ("resnet50", "timm/resnet18", "no model")])
print({"torch", "torchvision", "timm"} & sys.modules.keys())
""")
    assert printed == "['resnet50', 'timm/resnet18', 'no model']\nset()\n"
