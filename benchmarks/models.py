"""The model, preset and decoding that all approaches except imagevec use.

This is plain torchvision and Pillow, as in their documentation.
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
    """Returns a torchvision model that outputs pooled vectors: float32 (N, 3, S, S) -> (N, D).

    Args:
        model: Name in ``torchvision.models``.
        weights: ``"random"`` (seed 0), path of a ``.pth`` file, or name of torchvision weights.
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
    """Replaces the last linear layer with the identity, as in ``model.fc = nn.Identity()``."""
    if isinstance(net, torchvision.models.SqueezeNet):  # classifies with a convolution
        net.classifier = nn.AdaptiveAvgPool2d(1)
        return net
    *_, last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    parent, _, name = last.rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Identity())
    return net


def preset(model: str) -> Any:
    """Returns torchvision's preset of the default weights: PIL image -> float32 (3, S, S)."""
    return torchvision.models.get_model_weights(model).DEFAULT.transforms()


def decode(content: bytes) -> Image.Image:
    # Most code ignores EXIF orientation. It is applied here so that approaches are comparable on
    # real photos; without EXIF data it costs nothing.
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
