"""Engines: a prepared forward pass, behind one small protocol."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Engine(Protocol):
    """A model, loaded and ready.

    It takes pixels as they are after the crop, and normalises them itself: uint8 is a quarter of
    what would travel to a device as float32.
    """

    def __call__(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        """uint8 ``(N, 3, S, S)`` on the CPU to float32 ``(N, D)``, for any N >= 1."""
