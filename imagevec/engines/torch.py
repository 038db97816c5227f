"""The PyTorch backend for CPU and CUDA. Its workers build the model from its source."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagevec import cache
from imagevec.engines import devices
from imagevec.spec import FeatureSpec

if TYPE_CHECKING:
    from imagevec.engines import Engine
    from imagevec.models.features import FeatureModel
    from imagevec.models.source import ModelSource

NAME = "torch"
logger = logging.getLogger(__name__)

BUILDS_MODULE = True
WORKER_MEMORY_MB = 1_536


def is_available() -> bool:
    return True  # PyTorch is a required dependency


def preload() -> None:
    import torch  # noqa: F401


def version() -> str:
    return importlib.metadata.version("torch")


def why_not(precision: str, device: str) -> str | None:
    if precision == "float16" and device == "cpu":
        return "precision='float16' needs CUDA: did you mean 'bfloat16'?"
    if precision == "int8":
        return "precision='int8' needs engine='openvino'"
    return None


def has_bfloat16(device: str) -> bool:
    import torch

    if device.startswith("cuda"):
        # As torch.cuda.is_bf16_supported does for the current device: since NVIDIA's Ampere.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    # oneDNN alone also says yes if it emulates bfloat16, as on every CPU with AVX-512.
    return devices.has_bfloat16() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepare(model: FeatureModel) -> tuple[Path, ...]:
    """Returns the weights file, or nothing for random weights, of a model that was checked."""
    from imagevec.engines.check import Reference

    with devices.within_quota():
        branches = Reference(model).branches
    if branches:
        logger.warning(
            "%s computes different functions of dark and bright images, which it tells apart by "
            "the whole batch: with batch_size=1, a vector does not depend on other images",
            model.source.name,
        )
    return (cache.store(model.weights_file),) if model.weights_file else ()


def load(
    spec: FeatureSpec,
    source: ModelSource | None,
    files: Sequence[Path],
    device: str,
    threads: int,
) -> Engine:
    import torch

    from imagevec.engines.torch_engine import TorchEngine
    from imagevec.models.features import feature_module

    assert source is not None  # BUILDS_MODULE
    torch.set_num_threads(threads if device == "cpu" else 1)
    model = feature_module(source, spec, files[0] if files else None)
    return TorchEngine(model, spec.preprocessing, device, spec.precision)
