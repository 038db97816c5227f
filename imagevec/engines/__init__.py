"""Engines: a prepared forward pass, behind one small protocol.

An engine takes pixels as they are after the crop, and normalises them itself: as uint8 they are a
quarter of what float32 would move to a device.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imagevec.images.preprocess import normalize
from imagevec.spec import Preprocessing


class Engine(Protocol):
    """A model, loaded and ready."""

    def __call__(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        """uint8 ``(N, 3, S, S)`` on the CPU to float32 ``(N, D)``, for any N >= 1."""


class PixelModel(nn.Module):
    """A feature model that takes uint8 pixels, ``(N, 3, S, S) -> (N, D)``."""

    def __init__(self, feature_model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.feature_model = feature_model
        self.preprocessing = preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.feature_model(normalize(images, self.preprocessing))
        return features
