from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
)
from imagevec.models.layers import to_feature_model
from tests.helpers.factories import Tiny, tiny, tiny_swin, tiny_vit
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import (
    pixels_of,
    preprocess,
    saved,
    vector_of,
)

IMAGE = photo(120, 90)
PNG = encode(IMAGE)
RANDOM: dict[str, Any] = {"weights": "random", "engine": "torch"}
INPUT_OF_32 = Preprocessing(resize_size=36, crop_size=32)


def model_input(preprocessing: Preprocessing) -> torch.Tensor:
    """float32 ``(1, 3, S, S)`` of ``IMAGE``."""
    return preprocess(pixels_of(IMAGE), preprocessing)[None]


@pytest.mark.parametrize("factory", [tiny, tiny_vit, tiny_swin])
def test_pooled_feeds_a_factorys_last_linear_layer(factory, tmp_path):
    weights = tmp_path / "weights.pth"
    model = saved(factory, weights)
    name = {tiny: tiny, tiny_vit: "tiny_vit", tiny_swin: "tiny_swin"}[factory]
    vector = vector_of(PNG, model=name, weights=str(weights))
    logits = vector_of(PNG, model=name, weights=str(weights), layer="logits")
    last_linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    np.testing.assert_allclose(last_linear(torch.tensor(vector)).detach(), logits, rtol=1e-4)


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


@pytest.mark.models
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
    vectorizer: Any = ImageVectorizer(**options, layer=layers)
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

    with pytest.raises(OptionError, match=r"layer=\('pooled', 'logits'\).*use only 'pooled' or"):
        ImageVectorizer(model=Branching, layer=("pooled", "logits"), **RANDOM)


def test_a_backbone_without_a_classifier_is_its_pooled_layer():
    def backbone() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    vectors = vector_of(PNG, model=backbone, weights="random", layer=("0", "pooled"))
    assert vectors["0"] == vectors["pooled"]


@pytest.mark.parametrize("size", [(64, 32), (32, 64)], ids=str)
def test_the_channels_of_an_oblong_input_are_told_from_its_rows(size):
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, kernel_size=5, stride=4)
            self.last = nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.conv(images)
            return self.last(maps.permute(0, 2, 3, 1)).mean((1, 2))

    images = torch.randn(2, 3, *size)
    model = ChannelsLast().eval()
    with torch.inference_mode():
        expected = model(images)
        layers = ("conv", "last")
        vectors = to_feature_model(model, layers, False, lambda count: images[:count])(images)
    torch.testing.assert_close(vectors, torch.cat([expected, expected], dim=1))
