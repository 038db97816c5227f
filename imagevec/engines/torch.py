"""The PyTorch engine, on CPU and CUDA."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import convert_conv2d_weight_memory_format

from imagevec.engines import PixelModel
from imagevec.spec import Preprocessing

logger = logging.getLogger(__name__)


class TorchEngine:
    """Runs a feature model eagerly: inference mode, batch norms folded, channels_last, autocast.

    On CUDA, pixels go through pinned memory. A batch that does not fit into the device's memory is
    halved until it does, and later batches are cut to what did.

    Args:
        model: float32 ``(N, 3, S, S)`` to ``(N, D)``, in evaluation mode.
        preprocessing: Its mean and std normalise the pixels.
        device: Where it runs.
        precision: ``"float32"``, or the dtype of autocast.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, device: torch.device, precision: str
    ) -> None:
        if precision == "bfloat16" and not supports_bfloat16(device.type):
            logger.warning("%s has no bfloat16 instructions: it will be slow", device)
        self._model = PixelModel(_fold_batch_norms(model), preprocessing).eval().to(device)
        # Convolutions alone: Module.to(memory_format=) fails on a buffer of five dimensions.
        convert_conv2d_weight_memory_format(self._model, torch.channels_last)
        self._device = device
        self._dtype = getattr(torch, precision)
        self._max_batch: int | None = None

    def __call__(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        chunks = torch.split(images, self._max_batch or len(images))
        return np.concatenate([self._forward_or_halve(chunk) for chunk in chunks])

    def _forward_or_halve(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        try:
            return self._forward(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        # Outside the handler: the exception's traceback held the tensors that did not fit.
        torch.cuda.empty_cache()
        self._max_batch = len(images) // 2
        logger.warning("%d images do not fit into %s: halving", len(images), self._device)
        return self(images)

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self._device, non_blocking=True)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            features = self._model(images)  # (N, 3, S, S) -> (N, D)
        array: npt.NDArray[np.float32] = features.float().cpu().numpy()
        return array


def supports_bfloat16(device_type: str) -> bool:
    """Whether this machine's ``"cpu"`` or ``"cuda"`` computes bfloat16 natively."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _fold_batch_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms folded into the convolutions before them, where traceable."""
    try:
        folded: nn.Module = optimization.fuse(model)
    except Exception as error:  # a model's own code runs under torch.fx's tracer
        logger.info("batch norms are not folded, torch.fx cannot trace the model: %s", error)
        return model
    return folded
