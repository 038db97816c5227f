"""The PyTorch engine, on CPU and CUDA."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imagevec.preprocess import normalize
from imagevec.spec import Preprocessing


class TorchEngine:
    """Runs a feature model eagerly: inference mode, channels_last, autocast below float32.

    Args:
        model: float32 ``(N, 3, S, S)`` to ``(N, D)``, in evaluation mode.
        preprocessing: Its mean and std normalise the pixels.
        device: Where it runs.
        precision: ``"float32"``, or the dtype of autocast.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, device: torch.device, precision: str
    ) -> None:
        self._model = model.to(device=device, memory_format=torch.channels_last)
        self._preprocessing = preprocessing
        self._device = device
        self._dtype = getattr(torch, precision)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        images = images.to(self._device).contiguous(memory_format=torch.channels_last)
        autocast = (
            nullcontext()
            if self._dtype == torch.float32
            else torch.autocast(self._device.type, self._dtype)
        )
        with autocast:
            features = self._model(normalize(images, self._preprocessing))  # -> (N, D)
        array: npt.NDArray[np.float32] = features.float().cpu().numpy()
        return array
