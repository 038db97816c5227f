from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
)
from imagevec.models.registry import find_source
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import (
    pixels_of,
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
    if not pytest.importorskip("timm").is_model(name):
        pytest.skip("a newer timm has it")
    with pytest.raises(OptionError, match=f"data config of 'timm/{name}' is not supported"):
        find_source(f"timm/{name}").preprocessing(None)
