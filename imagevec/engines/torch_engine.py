"""The engine of the PyTorch backend, and a PyTorch module that takes pixels."""

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
    """Runs a feature model eagerly in inference mode, with folded batch norms and channels_last.

    Lower precisions use autocast. On CUDA, inputs are copied through pinned memory. A batch that
    does not fit in the device's memory is halved until it fits, and later batches are limited to
    that size.

    Args:
        model: A module from float32 ``(N, 3, H, W)`` or int32 ``(N, L)`` to ``(N, D)``, in
            evaluation mode.
        preprocessing: The preprocessing, whose mean and std normalise pixels.
        device: The device to run on.
        precision: ``"float32"``, or the dtype of autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing | Tokenization,
        device: str,
        precision: str,
    ) -> None:
        model = model.eval().to(device)
        if isinstance(preprocessing, Preprocessing):
            model = _fold_batch_norms(PixelModel(model, preprocessing).eval())
        self._model = model
        # Only convolutions: Module.to(memory_format=) fails on a five-dimensional buffer.
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
        # Outside the handler, because the exception's traceback keeps the tensors alive.
        torch.cuda.empty_cache()
        self._max_batch = len(inputs) // 2
        logger.warning("%d inputs do not fit in %s: halving the batch", len(inputs), self._device)
        return self._in_chunks(inputs)

    def _forward(self, inputs: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._device.type == "cuda":
            inputs = inputs.pin_memory()
        inputs = inputs.to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            features = self._model(inputs)  # (N, H, W, 3) or (N, L) -> (N, D)
        array: npt.NDArray[np.float32] = features.float().cpu().numpy()
        return array


def _fold_batch_norms(model: PixelModel) -> PixelModel:
    """Folds batch norms into the preceding convolutions, if the vectors remain the same.

    Tracing with ``torch.fx`` fixes what Python computes, and drops contexts such as autocast.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(isinstance(module, norms) for module in model.modules()):
        return model
    try:
        fused: nn.Module = optimization.fuse(model.feature_model)
    except Exception as error:  # the model's own code runs under torch.fx's tracer
        logger.info("batch norms are not folded: torch.fx cannot trace the model: %s", error)
        return model
    folded = PixelModel(fused, model.preprocessing).eval()
    shape = (1, *model.preprocessing.input_shape, 3)
    pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    pixels = pixels.to(next(model.buffers()).device)
    with torch.inference_mode():
        vectors, expected = folded(pixels).float(), model(pixels).float()
    if vectors.shape == expected.shape and vectors.sub(expected).norm() <= 1e-2 * expected.norm():
        return folded
    logger.info("batch norms are not folded: a model that torch.fx traced returns other vectors")
    return model


class PixelModel(nn.Module):
    """Wraps a feature model to take uint8 pixels, ``(N, H, W, 3) -> (N, D)``."""

    def __init__(self, feature_model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.feature_model = feature_model
        self.preprocessing = preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        channels_first = images.permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W), channels_last
        features: torch.Tensor = self.feature_model(normalize(channels_first, self.preprocessing))
        return features


def normalize(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Normalises uint8 ``(N, 3, H, W)`` to float32 ``(N, 3, H, W)`` on the same device."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)
