from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from imagevec import OptionError, Preprocessing
from imagevec.models.layers import infer_num_features, to_feature_model
from tests.helpers.factories import tiny_swin, tiny_vit
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import pixels_of, preprocess, saved, vector_of

IMAGE = photo(120, 90)
PNG = encode(IMAGE)

Expected = Callable[[Any, torch.Tensor], torch.Tensor]


def output(model: Any, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(images)
    return result


def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model.features(images)
    return result


class Net(nn.Module):
    """Computes 8 features of ``(N, 3, S, S)``, and 5 logits of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, kernel_size=5, stride=4)
        self.fc = nn.Linear(8, 5)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).relu().mean((2, 3))

    def forward(self, images: torch.Tensor) -> Any:
        return self.fc(self.features(images))


class Pooler(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(self.features(images)))


class Gated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)
        return x * self.gate(x).sigmoid()


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.body = nn.Conv2d(3, 6, kernel_size=5, stride=4)
        self.neck = nn.Linear(6, 8)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.neck(self.body(images).relu().mean((2, 3))).relu()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)
        return torch.cat([self.fc(x), self.other(x)], dim=1)


class Residual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)
        return x + self.fc(x)


class Embedding(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.fc(self.features(images)))


class Twice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(self.features(images)).relu())


class OncePerImage(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fc(self.features(image[None])) for image in images])


class Probabilities(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.fc(self.features(images)), dim=1)


class FixedView(Net):
    """The logits are viewed as five; the features are eight."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(images)).view(-1, 5).softmax(1)


class TwoNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Dropout(), self.fc)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


class ReadsItsClassifier(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weight = self.fc.weight
        x = self.features(images).to(weight.dtype).to(weight.device)
        bias = 0 if self.fc.bias is None else 1
        return self.fc(x.view(-1, self.fc.in_features)).view(-1, weight.shape[bias - 1])


class Convolution(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(8, 5, kernel_size=1)  # type: ignore[assignment]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(images)[..., None, None]).flatten(1).softmax(1)


class Attention(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.MultiheadAttention(8, 2, batch_first=True)  # type: ignore[assignment]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)[:, None]
        return self.fc(x, x, x)[0][:, 0]


def parametrized() -> nn.Module:
    model = Net()
    parametrizations.weight_norm(model.fc)
    return model


def sequence() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, kernel_size=5, stride=4), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def headless_vit() -> nn.Module:
    model: Any = tiny_vit()
    model.heads = nn.Identity()
    return model


def squeezenet_with_a_linear_layer() -> nn.Module:
    model = torchvision.models.squeezenet1_1()
    model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))
    return model


def without_the_last(model: Any, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model[:-1](images)
    return result


def pooled_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    return model.features(images).mean((2, 3))


EXPECTED: dict[Any, Expected] = {
    headless_vit: output,
    Pooler: output,
    Gated: output,
    HeadFirst: features,
    TwoHeads: output,
    Residual: output,
    Embedding: output,
    Twice: output,
    Probabilities: features,
    FixedView: features,
    TwoNames: features,
    ReadsItsClassifier: features,
    Convolution: features,
    Attention: output,
    Net: features,
    parametrized: features,
    sequence: without_the_last,
    torchvision.models.squeezenet1_1: pooled_features,
    squeezenet_with_a_linear_layer: pooled_features,
}


def preprocessing_of(factory: Any) -> Preprocessing:
    is_vit = factory in (headless_vit, tiny_vit, tiny_swin, distilled)
    return Preprocessing(resize_size=36, crop_size=32) if is_vit else Preprocessing()


def model_input(preprocessing: Preprocessing) -> torch.Tensor:
    """float32 ``(1, 3, S, S)`` of ``IMAGE``."""
    return preprocess(pixels_of(IMAGE), preprocessing)[None]


def options_of(factory: Any, monkeypatch: pytest.MonkeyPatch, weights: Path) -> dict[str, Any]:
    """Registers a factory for the duration of a test, with weights in a file."""
    from imagevec import register_model
    from imagevec.models.source import REGISTERED

    name = f"{factory.__name__} of test_pooled"
    register_model(name, factory, preprocessing=preprocessing_of(factory))
    monkeypatch.setitem(REGISTERED, name, REGISTERED.pop(name))
    return {"model": name, "weights": str(weights)}


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("factory", EXPECTED, ids=lambda factory: factory.__name__)
def test_pooled_is_the_input_of_the_classifier_or_the_output(
    factory, engine, tmp_path, monkeypatch
):
    if engine == "openvino":
        pytest.importorskip("openvino")
    model = saved(factory, tmp_path / "weights.pth")
    with torch.inference_mode():
        (expected,) = EXPECTED[factory](model, model_input(preprocessing_of(factory)))
    options = options_of(factory, monkeypatch, tmp_path / "weights.pth")
    vector = np.array(vector_of(PNG, **options, engine=engine))
    assert len(vector) == len(expected)
    np.testing.assert_allclose(vector, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("factory", EXPECTED, ids=lambda factory: factory.__name__)
def test_pooled_beside_other_layers_is_the_same(factory, tmp_path, monkeypatch):
    saved(factory, tmp_path / "weights.pth")
    options = options_of(factory, monkeypatch, tmp_path / "weights.pth")
    both = vector_of(PNG, **options, layer=("logits", "pooled"))
    for layer, vector in both.items():
        alone = np.array(vector_of(PNG, **options, layer=layer))
        np.testing.assert_allclose(vector, alone, atol=1e-5 * np.abs(alone).max())


SAME_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: F.log_softmax(y, dim=1),
    "sigmoid": torch.sigmoid,
    "sigmoid_": lambda y: y.sigmoid_(),
    "log_sigmoid": F.logsigmoid,
    "view": lambda y: y.view(-1, 5),
    "flatten": lambda y: y.flatten(1),
    "squeeze": lambda y: y[:, :, None].squeeze(2),
    "squeeze_": lambda y: y.unsqueeze(1).squeeze_(1),
    "clone": torch.clone,
    "double": lambda y: y.double().float(),
    "dropout": nn.Dropout().eval(),
    "cat": lambda y: torch.cat([y], dim=1),
}
OTHER_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu_": lambda y: y.relu_(),
    "half": lambda y: 0.5 * y,
    "normalize": F.normalize,
    "flip": lambda y: y.flip(1),
    "twice": lambda y: torch.cat([y, y], dim=1)[:, :5].contiguous(),
    "first": lambda y: y.index_select(1, torch.tensor([0], device=y.device)).repeat(1, 5),
    "clamp": lambda y: y.clamp(-1e9, 1e9),
    "add_": lambda y: y.add_(1),
    "alias": lambda y: (y.view(-1).mul_(2), y)[1],
}
OPERATIONS = {**SAME_VALUES, **OTHER_VALUES}


class Drawn(nn.Module):
    """A model with layers in any order, hidden layers and operations after its last layer."""

    def __init__(self, order: list[str], after: list[str], convolution: bool) -> None:
        super().__init__()
        last = nn.Conv2d(8, 5, kernel_size=1) if convolution else nn.Linear(8, 5)
        layers = {"last": last, "body": nn.Conv2d(3, 8, kernel_size=3, stride=2)}
        for name in order:
            self.add_module(name, layers.get(name, nn.Linear(8, 8)))
        self.hidden_layers = sorted(set(order) - {"last", "body", "unused"})
        self.after = after

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule("body")(images).relu().mean((2, 3))
        for name in self.hidden_layers:
            x = self.get_submodule(name)(x).relu()
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, last = self.features(images), self.get_submodule("last")
        y = last(x[..., None, None]).flatten(1) if isinstance(last, nn.Conv2d) else last(x)
        for name in self.after:
            y = OPERATIONS[name](y)
        return y


@given(
    order=st.permutations(["last", "body", "hidden", "unused", "z_hidden"]),
    left_out=st.sets(st.sampled_from(["hidden", "unused", "z_hidden"])),
    after=st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=4),
    convolution=st.booleans(),
    device=st.sampled_from(["cpu", "meta"]),
)
def test_pooled_of_any_model(order, left_out, after, convolution, device):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(after))
        names = [name for name in order if name not in left_out]
        model = Drawn(names, after, convolution).eval()
        images = torch.randn(3, 3, 8, 8)
    has_classifier = SAME_VALUES.keys() >= set(after)
    with torch.inference_mode():
        expected = model.features(images) if has_classifier else model(images)
    feature_model = to_feature_model(
        model, "pooled", normalize=False, example=lambda count: images[:count].to(device)
    )
    assert infer_num_features(feature_model, images.to(device)) == (expected.shape[1],)
    assert feature_model.dropped.startswith("last") == has_classifier
    with torch.inference_mode():
        torch.testing.assert_close(feature_model(images), expected)


def distilled() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2
    )


def with_a_head_of_its_own() -> nn.Module:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=5)
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.Tanh())
    return model


@pytest.mark.parametrize(
    ("factory", "dropped"),
    [
        (Net, "fc (Linear, 8 to 5)"),
        (Convolution, "fc (Conv2d, 8 to 5)"),
        (sequence, "3 (Linear, 8 to 5)"),
        (parametrized, "fc (ParametrizedLinear, 8 to 5)"),
        (tiny_vit, "heads.head (Linear, 16 to 5)"),
        (torchvision.models.squeezenet1_1, "classifier.1 (Conv2d, 512 to 1000)"),
        (distilled, "head (Linear, 16 to 1000), head_dist (Linear, 16 to 1000)"),
        (Pooler, None),
        (headless_vit, None),
        (with_a_head_of_its_own, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_dropped_layer_of_a_factory_is_logged_once(factory, dropped, caplog, monkeypatch):
    options = options_of(factory, monkeypatch, Path("random"))
    with caplog.at_level(logging.WARNING):
        vector_of(PNG, **options)
    messages = [record.getMessage() for record in caplog.records if "drop" in record.getMessage()]
    expected = f"dropped the last layer {dropped}; layer='logits' keeps it"
    assert messages == ([] if dropped is None else [expected])


def test_a_dropped_layer_of_a_named_model_is_not_logged(caplog):
    with caplog.at_level(logging.WARNING):
        vector_of(PNG, model="resnet18", weights="random")
    assert not caplog.records


class Branching(Net):
    """Classifies dark images by another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dark = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)
        return self.fc(x) if images.sum() > 0 else self.dark(x)


def test_layer_that_runs_once_per_image_is_no_classifier():
    images = torch.randn(3, 3, 8, 8)
    feature_model = to_feature_model(OncePerImage(), "pooled", False, lambda n: images[:n])
    assert feature_model.dropped == ""
    assert feature_model(images).shape == (3, 5)


def test_images_that_skip_the_classifier_are_an_error():
    images = torch.ones(2, 3, 8, 8)
    feature_model = to_feature_model(Branching(), "pooled", False, lambda count: images[:count])
    assert feature_model(images).shape == (2, 8)
    with pytest.raises(OptionError, match="for some inputs only; use layer='logits'"):
        feature_model(-images)


def test_threads_do_not_get_the_features_of_others():
    batches = [torch.randn(2, 3, 16, 16) for _ in range(64)]
    model = Net().eval()
    with torch.inference_mode():
        expected = [model.features(batch) for batch in batches]
    feature_model = to_feature_model(model, "pooled", False, lambda count: batches[0][:count])
    with ThreadPoolExecutor(4) as pool:
        for features_, vectors in zip(expected, pool.map(feature_model, batches), strict=True):
            torch.testing.assert_close(vectors, features_)


def test_the_classifiers_weights_are_not_part_of_the_features():
    feature_model = to_feature_model(Net(), "pooled", False, lambda n: torch.zeros(n, 3, 8, 8))
    assert set(feature_model.state_dict()) == {"model.model.body.weight", "model.model.body.bias"}


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mobilenet_v3_small", ("pooled", "logits")),
        ("timm/resnet10t", ("pooled", "logits")),
        ("timm/test_convnext", ("pooled", "logits")),
        ("timm/dla46_c", ("pooled", "logits")),
        ("timm/repvit_m0_9", ("pooled", "logits")),
        ("timm/levit_128s", ("pooled", "stages.0")),
        ("timm/deit_tiny_distilled_patch16_224", ("pooled", "blocks.0")),
    ],
)
def test_pooled_of_a_library_is_the_same_beside_other_layers(name, layers):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    both = vector_of(PNG, model=name, weights="random", layer=layers)
    alone = np.array(vector_of(PNG, model=name, weights="random"))
    np.testing.assert_allclose(both["pooled"], alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.models
def test_several_classifiers_do_not_fit_beside_the_logits():
    pytest.importorskip("timm")
    with pytest.raises(OptionError, match="several classifiers"):
        vector_of(PNG, model="timm/levit_128s", weights="random", layer=("pooled", "logits"))
