from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
)
from imagevec.images.preprocess import resize_and_crop
from imagevec.models.registry import find_source
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

IMAGE = photo(120, 90)
PNG = encode(IMAGE)
TIMM_WITH_WEIGHTS = ["tf_efficientnet_lite0", "vit_tiny_patch16_224"]


def model_input(preprocessing: Preprocessing) -> torch.Tensor:
    """float32 ``(1, 3, S, S)`` of ``IMAGE``."""
    return preprocess(pixels_of(IMAGE), preprocessing)[None]


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


@pytest.mark.parametrize(
    ("name", "layer", "pool"),
    [
        ("tf_efficientnet_lite0", "blocks.2", lambda node: node.mean((2, 3))),
        ("test_mambaout", "stages.1", lambda node: node.mean((1, 2))),
        ("test_mambaout", "stem.conv1", lambda node: node.mean((2, 3))),
        ("vit_tiny_patch16_224", "blocks.1", lambda node: node[:, 0]),
        ("vit_tiny_patch16_224", "patch_embed", lambda node: node.mean(1)),
        ("xcit_nano_12_p16_224", "blocks.1", lambda node: node.mean(1)),
        ("mixer_s32_224", "blocks.1", lambda node: node.mean(1)),
        ("vit_wee_patch16_reg1_gap_256", "blocks.1", lambda node: node[:, 1:].mean(1)),
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
def test_timms_layers_are_pooled_as_their_shape_says(name, layer, pool, tmp_path):
    timm = pytest.importorskip("timm")
    weights = tmp_path / "weights.pth"
    model = saved(functools.partial(timm.create_model, name), weights)
    nodes = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: nodes.append(out))
    source = find_source(f"timm/{name}")
    with torch.inference_mode():
        model(model_input(source.preprocessing(None)))
    options = {"model": source.name, "weights": str(weights), "engine": "auto"}
    vector = vector_of(PNG, **options, layer=(layer, "pooled"))[layer]
    (expected,) = pool(nodes[0])
    assert len(vector) == len(expected)
    assert cosine(vector, expected) >= 0.9999


def test_a_data_config_that_is_not_supported_is_refused():
    name = "deepseek_vit_412m"  # its crop_mode is 'border'
    if not pytest.importorskip("timm").is_model(name):
        pytest.skip("a newer timm has it")
    with pytest.raises(OptionError, match=f"data config of 'timm/{name}' is not supported"):
        find_source(f"timm/{name}").preprocessing(None)


def transform_of(name: str, size: Any = None) -> Any:
    """timm's evaluation transform for an input size; ``None`` is the model's own."""
    timm = pytest.importorskip("timm")
    args = {} if size is None else {"input_size": (3, *height_and_width(size))}
    pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    return timm.data.create_transform(**timm.data.resolve_data_config(args, pretrained_cfg))


def test_an_own_size_may_be_no_square():
    name = "vit_base_patch16_sapiens2"
    if not pytest.importorskip("timm").is_model(name):
        pytest.skip("a newer timm has it")
    preprocessing = find_source(f"timm/{name}").preprocessing(None)
    assert preprocessing.input_shape == (1024, 768)
    ours = preprocess(pixels_of(IMAGE), preprocessing)
    assert cosine(ours.flatten(), transform_of(name)(IMAGE).flatten()) >= 0.9999


@pytest.mark.parametrize("name", ["test_vit", "resnet18.a1_in1k", "tiny_vit_21m_512"])
@pytest.mark.parametrize("input_size", [224, 321, (160, 96), (97, 161), (64, 256)], ids=str)
def test_preprocessing_of_another_size_is_timms(name, input_size):
    source = find_source(f"timm/{name}")
    preprocessing = source.resized(source.preprocessing(None), input_size)
    transform = transform_of(name, input_size)
    assert preprocessing.input_shape == height_and_width(input_size)
    for size in [(501, 375), (240, 321), (900, 101), (61, 47)]:
        image = photo(*size)
        ours, theirs = preprocess(pixels_of(image), preprocessing), transform(image)
        assert cosine(ours.flatten(), theirs.flatten()) >= 0.9999
        assert (ours - theirs).abs().max() < 3 / 255 / min(preprocessing.std)


def with_positions(name: str, weights: Path) -> None:
    """Saves a seeded model whose features depend on positions, unlike those of small weights."""
    timm = pytest.importorskip("timm")
    saved(functools.partial(timm.create_model, name), weights)
    tensors = torch.load(weights)
    for key in tensors:
        if "pos_embed" in key or "relative_position_bias_table" in key:
            tensors[key] *= 50
    torch.save(tensors, weights)


def features_by_timm(name: str, weights: Path, size: Any, images: list[Image.Image]) -> Any:
    """timm's own features of images, float32 ``(N, D)``, with pretrained weights from a file."""
    timm = pytest.importorskip("timm")
    is_fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights), "custom_load": False},
        **({"img_size": height_and_width(size)} if is_fixed else {}),
    )
    model.reset_classifier(0)
    with torch.inference_mode():
        return model.eval()(torch.stack([transform_of(name, size)(image) for image in images]))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # by timm
@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("name", "input_size"),
    [
        ("test_vit", 224),
        ("test_vit", (160, 96)),
        ("test_vit", (80, 320)),  # as many patches as its own size has
        ("test_resnet", (97, 161)),
        ("test_convnext", 224),
        ("test_maxvit", (128, 192)),
        ("swin_tiny_patch4_window7_224", (128, 96)),
        ("eva02_tiny_patch14_224", (126, 182)),
        ("vit_small_patch14_dinov2", (224, 112)),
    ],
    ids=str,
)
def test_features_of_another_size_are_timms(name, input_size, engine, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    weights = tmp_path / "weights.pth"
    with_positions(name, weights)
    images = [photo(*size, seed) for seed, size in enumerate([(201, 333), (640, 427), (97, 61)])]
    expected = features_by_timm(name, weights, input_size, images)
    options = {"model": f"timm/{name}", "weights": str(weights), "engine": engine}
    plan, engine_ = plan_and_engine(**options, input_size=input_size)
    preprocessing = plan.spec.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    inputs = [resize_and_crop(pixels_of(x), preprocessing) for x in images]
    together = engine_(np.stack(inputs))
    assert together.shape == tuple(expected.shape)
    for vector, alone, wanted in zip(together, inputs, expected, strict=True):
        assert cosine(vector, wanted) >= 0.9999
        assert cosine(engine_(np.stack([alone]))[0], wanted) >= 0.9999


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # by timm
@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize(
    ("name", "layer", "size", "pool"),
    [
        ("test_convnext", "stages.1", (160, 96), lambda node: node.mean((2, 3))),
        ("swin_tiny_patch4_window7_224", "layers.1", (64, 192), lambda node: node.mean((1, 2))),
        ("test_vit", "blocks.1", (160, 96), lambda node: node[:, 0]),
        ("test_vit", "blocks.1", (64, 192), lambda node: node[:, 0]),
        ("test_vit", "patch_embed", (64, 192), lambda node: node.mean((1, 2))),
    ],
    ids=["channels_first", "channels_last", "class_token", "class_token_of_a_band", "patches"],
)
def test_layers_of_another_size_are_pooled_as_their_shape_says(name, layer, size, pool, tmp_path):
    weights = tmp_path / "weights.pth"
    options = {"img_size": size} if name != "test_convnext" else {}
    model = saved(
        functools.partial(pytest.importorskip("timm").create_model, name, **options), weights
    )
    nodes = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: nodes.append(out))
    source = find_source(f"timm/{name}")
    with torch.inference_mode():
        model(model_input(source.resized(source.preprocessing(None), size)))
    given = {"model": source.name, "weights": str(weights), "layer": layer, "input_size": size}
    (expected,) = pool(nodes[0])
    assert cosine(vector_of(PNG, **given), expected) >= 0.9999


def test_weights_of_the_size_are_used_as_they_are(tmp_path):
    timm = pytest.importorskip("timm")
    weights = tmp_path / "weights.pth"
    model = saved(functools.partial(timm.create_model, "test_vit", img_size=(160, 96)), weights)
    reset_classifier: Any = model.reset_classifier
    reset_classifier(0)
    with torch.inference_mode():
        expected = model(transform_of("test_vit", (160, 96))(IMAGE)[None])[0]
    options = {"model": "timm/test_vit", "weights": str(weights), "input_size": (160, 96)}
    assert cosine(vector_of(PNG, **options), expected) >= 0.9999


def test_weights_of_other_classes_are_resampled(tmp_path):
    timm = pytest.importorskip("timm")
    weights, original = tmp_path / "weights.pth", tmp_path / "original.pth"
    with_positions("test_vit", original)
    tensors = torch.load(original)
    tensors["head.weight"], tensors["head.bias"] = torch.zeros(10, 64), torch.zeros(10)
    torch.save(tensors, weights)
    assert timm.create_model("test_vit").head.in_features == 64
    options = {"model": "timm/test_vit", "input_size": (160, 96)}
    expected = vector_of(PNG, weights=str(original), **options)
    assert cosine(vector_of(PNG, weights=str(weights), **options), expected) >= 0.9999


def test_default_weights_are_resampled(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    weights = tmp_path / "weights.pth"
    with_positions("test_vit", weights)
    create_model = timm.create_model

    def downloaded(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            overlay = {"file": str(weights), **options.pop("pretrained_cfg_overlay", {})}
            options["pretrained_cfg_overlay"] = overlay
        return create_model(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", downloaded)
    options: dict[str, Any] = {"model": "timm/test_vit", "weights": "DEFAULT"}
    resized = ImageVectorizer(**options, input_size=(160, 96), engine="torch")
    assert resized.spec.weights == ImageVectorizer(**options, engine="torch").spec.weights
    (expected,) = features_by_timm("test_vit", weights, (160, 96), [IMAGE])
    assert cosine(resized.extract_features(PNG), expected) >= 0.9999


@pytest.mark.parametrize(
    ("name", "input_size", "reason"),
    [
        ("levit_128s", 256, "cannot resize the weights of .*, which take 224"),
        ("convit_tiny", (160, 96), "cannot resize the weights of .*, which take 224"),
        ("test_vit", (160, 100), "cannot run it .*; its own size is 160"),
        ("dla34", 112, "cannot run it .*; its own size is 224"),
        ("nest_tiny", (160, 96), "cannot run it .*; its own size is 224"),
    ],
)
def test_a_size_that_a_model_does_not_take_is_refused(name, input_size, reason, tmp_path):
    weights = tmp_path / "weights.pth"
    with_positions(name, weights)
    options: dict[str, Any] = {"model": f"timm/{name}", "weights": str(weights), "engine": "torch"}
    with pytest.raises(OptionError, match=f"input_size=.* is not valid: .*{reason}"):
        ImageVectorizer(**options, input_size=input_size)
