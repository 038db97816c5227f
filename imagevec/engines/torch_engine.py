"""A PyTorch module that takes pixels, and the engine that runs one."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import convert_conv2d_weight_memory_format

from imagevec.engines import Inputs
from imagevec.spec import Preprocessing, Tokenization

logger = logging.getLogger(__name__)


class TorchEngine:
    """Runs a feature model eagerly: inference mode, batch norms folded, channels_last, autocast.

    On CUDA, pixels go through pinned memory. A batch that does not fit into the device's memory is
    halved until it does, and later batches are cut to what did.

    Args:
        model: float32 ``(N, 3, S, S)``, or int32 ``(N, L)``, to ``(N, D)``, in evaluation mode.
        preprocessing: Its mean and std normalise pixels.
        device: Where it runs.
        precision: ``"float32"``, or the dtype of autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing | Tokenization,
        device: str,
        precision: str,
    ) -> None:
        if isinstance(preprocessing, Preprocessing):
            model = PixelModel(_fold_batch_norms(model), preprocessing)
        self._model = model.eval().to(device)
        # Convolutions alone: Module.to(memory_format=) fails on a buffer of five dimensions.
        convert_conv2d_weight_memory_format(self._model, torch.channels_last)
        self._device = torch.device(device)
        self._dtype = getattr(torch, precision)
        self._max_batch: int | None = None

    def __call__(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return self._in_chunks(torch.from_numpy(inputs))  # not copied

    def _in_chunks(self, inputs: torch.Tensor) -> npt.NDArray[np.float32]:
        chunks = torch.split(inputs, self._max_batch or len(inputs))
        return np.concatenate([self._forward_or_halve(chunk) for chunk in chunks])

    def _forward_or_halve(self, inputs: torch.Tensor) -> npt.NDArray[np.float32]:
        try:
            return self._forward(inputs)
        except torch.OutOfMemoryError:
            if len(inputs) == 1:
                raise
        # Outside the handler: the exception's traceback held the tensors that did not fit.
        torch.cuda.empty_cache()
        self._max_batch = len(inputs) // 2
        logger.warning("%d inputs do not fit into %s: halving", len(inputs), self._device)
        return self._in_chunks(inputs)

    def _forward(self, inputs: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._device.type == "cuda":
            inputs = inputs.pin_memory()
        inputs = inputs.to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            features = self._model(inputs)  # (N, S, S, 3) or (N, L) -> (N, D)
        array: npt.NDArray[np.float32] = features.float().cpu().numpy()
        return array


def _fold_batch_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms folded into the convolutions before them, where traceable."""
    try:
        folded: nn.Module = optimization.fuse(model)
    except Exception as error:  # a model's own code runs under torch.fx's tracer
        logger.info("batch norms are not folded, torch.fx cannot trace the model: %s", error)
        return model
    return folded


class PixelModel(nn.Module):
    """A feature model that takes uint8 pixels, ``(N, S, S, 3) -> (N, D)``."""

    def __init__(self, feature_model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.feature_model = feature_model
        self.preprocessing = preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        channels_first = images.permute(0, 3, 1, 2)  # (N, S, S, 3) -> (N, 3, S, S), channels_last
        features: torch.Tensor = self.feature_model(normalize(channels_first, self.preprocessing))
        return features


def normalize(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 ``(N, 3, S, S)`` to float32 ``(N, 3, S, S)`` on the same device."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)
