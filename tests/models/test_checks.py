from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import nn

from imagevec import ImageVectorizer, OptionError
from imagevec.models.layers import infer_num_features, to_feature_model

IMAGES = torch.randn(2, 3, 8, 8)

Pair = collections.namedtuple("Pair", ["logits", "features"])


class Returning(nn.Module):
    """Returns what a function makes of feature maps, ``(N, 6, 3, 3)``."""

    def __init__(
        self, function: Any, dtype: torch.dtype = torch.float32, channels: int = 3
    ) -> None:
        super().__init__()
        self.function = function
        self.body = nn.Conv2d(channels, 6, kernel_size=3, stride=2, dtype=dtype)
        self.fc = nn.Linear(6, 5, dtype=dtype)

    def forward(self, images: torch.Tensor) -> Any:
        return self.function(self.body(images))


def classify(maps: torch.Tensor) -> torch.Tensor:
    return maps.mean((2, 3))


def raise_an_error(maps: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such luck\nin two lines")


def message_of(function: Any, layer: Any = "logits", **options: Any) -> str:
    model = Returning(function, **options)
    with pytest.raises(OptionError) as caught:
        feature_model = to_feature_model(model, layer, False, lambda count: IMAGES[:count])
        infer_num_features(feature_model, IMAGES[:1])
    return str(caught.value)


OUTPUTS: dict[str, tuple[Any, list[str]]] = {
    "dictionary": (
        lambda maps: {"out": maps, "aux": maps},
        ["a dictionary with the keys 'out', 'aux'", "whose forward returns one of them"],
    ),
    "ordered_dictionary": (
        lambda maps: collections.OrderedDict(logits=maps),
        ["a dictionary with the keys 'logits'", "whose forward returns one of them"],
    ),
    "tuple": (
        lambda maps: (maps, maps.mean((2, 3))),
        ["a tuple of 2 values, (1, 6, 3, 3), (1, 6)", "whose forward returns one of them"],
    ),
    "named_tuple": (
        lambda maps: Pair(maps.mean((2, 3)), None),
        ["a Pair of 2 values, logits (1, 6), features <class 'NoneType'>", "one of them"],
    ),
    "list": (lambda maps: [maps], ["a list of 1 values, (1, 6, 3, 3)", "one of them"]),
    "nothing": (lambda maps: None, ["NoneType", "not a tensor (N, D)"]),
    "array": (lambda maps: maps.numpy(), ["ndarray", "not a tensor (N, D)"]),
    "maps": (lambda maps: maps, ["maps of the shape (1, 6, 3, 3)", "x.mean((2, 3))", "node"]),
    "tokens": (
        lambda maps: maps.flatten(2).mT,
        ["tokens of the shape (1, 9, 6)", "x[:, 0]", "x.mean(1)", "node"],
    ),
    "squeezed": (lambda maps: maps.mean((2, 3)).squeeze(), ["the shape (6,)", "squeeze()"]),
    "number": (lambda maps: maps.mean((1, 2, 3)), ["the shape (1,)", "(N, 1)"]),
    "scalar": (lambda maps: maps.mean(), ["a number of the shape ()"]),
    "volumes": (lambda maps: maps[..., None], ["(1, 6, 3, 3, 1)", "x.flatten(1)"]),
    "folded_batch": (
        lambda maps: maps.flatten(2).mT.reshape(-1, 6),
        ["9 vectors for a batch of 1"],
    ),
    "empty": (lambda maps: maps.mean((2, 3))[:, :0], ["vectors without numbers, (1, 0)"]),
    "integers": (lambda maps: maps.mean((2, 3)).long(), ["int64", "not float32"]),
    "booleans": (lambda maps: maps.mean((2, 3)) > 0, ["bool", "not float32"]),
    "complex": (lambda maps: torch.fft.fft(maps.mean((2, 3))), ["complex64", "not float32"]),
    "float64": (
        lambda maps: maps.mean((2, 3)).double(),
        ["float64", "end its forward with .float()"],
    ),
    "bfloat16": (lambda maps: maps.mean((2, 3)).bfloat16(), ["bfloat16", ".float()"]),
}


@pytest.mark.parametrize("layer", ["logits", "pooled", ("logits", "pooled")], ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_other_outputs_are_refused_with_a_choice(output, layer):
    function, fragments = OUTPUTS[output]
    if output == "array" and layer == ("logits", "pooled"):
        pytest.skip("torch.fx cannot trace it")
    message = message_of(function, layer)
    assert message.startswith(f"layer={layer!r}: the model returns ")
    for fragment in fragments:
        assert fragment in message


def test_a_classifier_in_another_type_is_refused():
    assert "float64" in message_of(lambda maps: maps.double().mean((2, 3)), "pooled")


@pytest.mark.parametrize("layer", ["logits", "pooled", "body"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_type_are_refused(dtype, layer):
    message = message_of(classify, layer, dtype=dtype)
    assert f"the model's weights are {str(dtype).removeprefix('torch.')} (body.weight)" in message
    assert "model.float()" in message


@pytest.mark.parametrize("layer", ["logits", "pooled", "body", ("body", "pooled")])
@pytest.mark.parametrize(
    ("channels", "cure"), [(1, "images.mean(1, keepdim=True)"), (4, "converts")]
)
def test_models_of_other_channels_are_refused(channels, cure, layer):
    message = message_of(classify, layer, channels=channels)
    assert f"layer={layer!r}: the model takes {channels} channel" in message
    assert "not RGB" in message
    assert cure in message


@pytest.mark.parametrize("layer", ["logits", "pooled"])
def test_errors_of_a_models_own_code_name_the_layer(layer):
    message = message_of(raise_an_error, layer)
    assert message.startswith(f"layer={layer!r}: the model raises ValueError for an input of ")
    assert ", 3, 8, 8): no such luck; layer='logits'" in message


def test_errors_of_a_models_own_code_are_the_cause():
    feature_model = to_feature_model(Returning(raise_an_error), "logits", False, lambda n: IMAGES)
    with pytest.raises(OptionError) as caught:
        infer_num_features(feature_model, IMAGES)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_lack_of_memory_is_not_an_option():
    def allocate(maps: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        to_feature_model(Returning(allocate), "pooled", False, lambda count: IMAGES[:count])


def lazy() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize("weights", ["DEFAULT", "random"])
def test_weights_without_a_shape_are_refused(weights):
    with pytest.raises(OptionError, match=r"'2.weight'.*run its model once"):
        ImageVectorizer(model=lazy, weights=weights)


def test_weights_of_a_file_give_a_lazy_layer_its_shape(tmp_path):
    torch.save({"2.weight": torch.ones(5, 3), "2.bias": torch.ones(5)}, tmp_path / "w.pth")
    assert ImageVectorizer(model=lazy, weights=str(tmp_path / "w.pth")).num_features == 3


def test_the_meta_pass_leaves_the_model_as_it_was():
    class Caching(Returning):
        cached: torch.Tensor | None = None

        def forward(self, images: torch.Tensor) -> Any:
            self.cached = classify(self.body(images))
            self.register_buffer("kept", self.cached)
            return self.fc(self.cached)

    model = Caching(None)
    feature_model = to_feature_model(model, "pooled", False, lambda n: IMAGES[:n].to("meta"))
    assert infer_num_features(feature_model, IMAGES.to("meta")) == (6,)
    assert model.cached is None
    assert not any(tensor.is_meta for tensor in feature_model.state_dict().values())


@pytest.mark.parametrize(
    ("function", "fragment"),
    [
        (lambda maps: {"out": maps, "aux": maps}, "a dictionary with the keys 'out', 'aux'"),
        (lambda maps: maps, "use a factory whose forward returns x.mean((2, 3))"),
        (raise_an_error, "the model raises ValueError"),
    ],
)
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_factory_is_refused_while_planning(function, fragment, engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(OptionError) as caught:
        ImageVectorizer(model=lambda: Returning(function), engine=engine)
    assert str(caught.value).startswith("layer='pooled': ")
    assert fragment in str(caught.value)
