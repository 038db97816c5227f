from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from imagevec import (
    FeatureSpec,
    ImageVectorizer,
    OptionError,
    Preprocessing,
    SerializationError,
    register_model,
)
from imagevec.models.source import REGISTERED
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved, vector_of

PNG = encode(photo(120, 90))
WHITE = encode(Image.new("RGB", (50, 50), (255, 255, 255)))
RANDOM: dict[str, Any] = {"weights": "random", "engine": "torch"}


class CallableObject:
    def __call__(self) -> nn.Module:
        return Tiny()


@pytest.mark.parametrize(
    "factory",
    [tiny, Tiny, lambda: Tiny(), functools.partial(tiny), CallableObject()],
    ids=["function", "class", "lambda", "partial", "object"],
)
def test_a_factory_is_any_callable_that_makes_a_model(factory):
    vectorizer: Any = ImageVectorizer(model=factory, **RANDOM)
    assert vectorizer.num_features == len(vectorizer.extract_features(PNG)) == 8


def test_a_factory_keeps_the_weights_that_it_sets():
    def all_ones() -> nn.Module:
        model = Tiny()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)
        return model

    pixel = (1 - torch.tensor(Preprocessing().mean)) / torch.tensor(Preprocessing().std)
    vector = vector_of(WHITE, model=all_ones)
    np.testing.assert_allclose(vector, [0.01 * (25 * pixel.sum() + 1)] * 8, rtol=1e-4)


def scaled(scale: Any) -> nn.Module:
    """A model whose vectors are multiples of ``scale``."""
    model = Tiny()
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(scale))
    return model


SCALE = 0.01


def reads_a_global() -> nn.Module:
    return scaled(SCALE)


def reads_a_default(scale: float = 0.01) -> nn.Module:
    return scaled(scale)


def change_nothing(folder: Path) -> tuple[Any, Callable[[], object]]:
    return reads_a_global, lambda: None


def change_a_global(folder: Path) -> tuple[Any, Callable[[], object]]:
    return reads_a_global, lambda: globals().update(SCALE=0.02)


def change_a_default(folder: Path) -> tuple[Any, Callable[[], object]]:
    return reads_a_default, lambda: setattr(reads_a_default, "__defaults__", (0.02,))


def change_a_closure(folder: Path) -> tuple[Any, Callable[[], object]]:
    scale = 0.01

    def change() -> None:
        nonlocal scale
        scale = 0.02

    return lambda: scaled(scale), change


def change_a_file(folder: Path) -> tuple[Any, Callable[[], object]]:
    file = folder / "scale"
    file.write_text("0.01")
    return lambda: scaled(file.read_text()), lambda: file.write_text("0.02")


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(
    ("prepare", "ratio"),
    [
        (change_nothing, 1),
        (change_a_global, 2),
        (change_a_default, 2),
        (change_a_closure, 2),
        (change_a_file, 2),
    ],
)
def test_a_factory_that_changes_is_called_again(prepare, ratio, registered, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 0.01)
    monkeypatch.setattr(reads_a_default, "__defaults__", (0.01,))
    factory, change = prepare(tmp_path)
    model = factory
    if registered:
        model = f"{prepare.__name__} of test_factory"
        register_model(model, factory)
        monkeypatch.setitem(REGISTERED, model, REGISTERED.pop(model))  # it goes after the test
    first, key = vector_of(WHITE, model=model), make_plan(model=model, engine="torch").key
    change()
    second = vector_of(WHITE, model=model)
    np.testing.assert_allclose(second, [ratio * value for value in first], rtol=1e-5)
    assert (make_plan(model=model, engine="torch").key == key) == (ratio == 1)


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
    with pytest.raises(OptionError, match="use a zero-argument factory"):
        ImageVectorizer(model=Tiny(), **RANDOM)


def negated(model: nn.Module) -> nn.Module:
    class Negated(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return -super().forward(images)

    other = Negated()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("registered", [False, True])
def test_edited_factory_has_another_fingerprint(
    registered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same name and weights."""
    saved(Tiny, tmp_path / "weights.pth")

    def spec_of(factory: Any) -> FeatureSpec:
        model = factory
        if registered:
            model = "edited factory"
            register_model(model, factory)
            monkeypatch.setitem(REGISTERED, model, REGISTERED.pop(model))
        weights = str(tmp_path / "weights.pth")
        spec = make_plan(model=model, weights=weights, layer="logits").spec
        REGISTERED.pop("edited factory", None)
        return spec

    def factory() -> nn.Module:
        return tiny()

    original = factory

    def factory() -> nn.Module:  # type: ignore[no-redef]
        return negated(tiny())

    first, again, edited = map(spec_of, (original, original, factory))
    assert re.fullmatch("[0-9a-f]{16}", first.code)
    assert first == again
    assert edited.code != first.code
    assert dataclasses.replace(edited, code=first.code) == first
    assert edited.fingerprint != first.fingerprint


def test_code_of_other_models_is_empty() -> None:
    assert make_plan(model="squeezenet1_1", weights="random").spec.code == ""


def test_code_counts_in_plans_that_build_equal_modules() -> None:
    """The module is equal, so files are reused, but not the spec."""
    first = make_plan(model=lambda: Tiny(), weights="random").spec
    second = make_plan(model=lambda: tiny(), weights="random").spec
    assert first.code != second.code
    assert make_plan(model=lambda: Tiny(), weights="random").spec.code == first.code


def test_missing_module_of_a_factory_is_named() -> None:
    def factory() -> nn.Module:
        import not_installed_here  # type: ignore[import-not-found]

        return not_installed_here.Net()

    with pytest.raises(SerializationError, match=r"No module named 'not_installed.*addPyFile"):
        ImageVectorizer(model=factory, **RANDOM)
