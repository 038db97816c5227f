"""The model, the preset and the decoding that every approach but ours is written with.

It is plain torchvision and Pillow, as their own documentation shows them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from PIL import Image, ImageOps
from torch import nn


def load_feature_model(model: str, weights: str = "random") -> nn.Module:
    """A torchvision model whose output is its pooled vector: float32 (N, 3, S, S) -> (N, D).

    Args:
        model: A name of ``torchvision.models``.
        weights: ``"random"`` (seed 0), a path to a ``.pth`` file, or a torchvision weights name.
    """
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = torchvision.models.get_model(model, weights=None)
    elif weights.endswith((".pth", ".pt")):
        net = torchvision.models.get_model(model, weights=None)
        net.load_state_dict(torch.load(Path(weights), weights_only=True))
    else:
        net = torchvision.models.get_model(model, weights=weights)
    return without_classifier(net).eval()


def without_classifier(net: nn.Module) -> nn.Module:
    """Puts the identity in the place of the last linear layer: ``model.fc = nn.Identity()``."""
    if isinstance(net, torchvision.models.SqueezeNet):  # classifies with a convolution
        net.classifier = nn.AdaptiveAvgPool2d(1)
        return net
    *_, last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    parent, _, name = last.rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Identity())
    return net


def preset(model: str) -> Any:
    """torchvision's preset of the default weights: a PIL image -> float32 (3, S, S)."""
    return torchvision.models.get_model_weights(model).DEFAULT.transforms()


def decode(content: bytes) -> Image.Image:
    # Few people turn an image as its EXIF says; without it the approaches would not be
    # comparable on photographs of one's own. It costs nothing where there is no EXIF.
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
