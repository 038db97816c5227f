from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
)
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import (
    vector_of,
)

PNG = encode(photo(120, 90))
RANDOM: dict[str, Any] = {"weights": "random", "engine": "torch"}


class Callable:
    def __call__(self) -> nn.Module:
        return Tiny()


@pytest.mark.parametrize(
    "factory",
    [tiny, Tiny, lambda: Tiny(), functools.partial(tiny), Callable()],
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
    with pytest.raises(OptionError, match="use a zero-argument factory"):
        ImageVectorizer(model=Tiny(), **RANDOM)
