"""Loads tensors from weights files, and loads them into models.

Only tensors are unpickled: ``.pth`` and ``.pt`` files are loaded with ``weights_only=True``, and
``.safetensors`` files contain nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn
from torch.overrides import TorchFunctionMode

from imagevec import cache
from imagevec.errors import OptionError, WeightsError
from imagevec.files import expanded
from imagevec.models.source import ModelSource
from imagevec.options import RANDOM, WEIGHTS_SUFFIXES
from imagevec.spec import Preprocessing, Tokenization

OFFLINE = (
    "Downloads are stored in ~/.cache, or in XDG_CACHE_HOME. Without a network, use "
    "weights='<path>' with a .pth, .pt, .bin or .safetensors file, or weights='random' for tests"
)


def local_file(model_name: str, option: str) -> Path | None:
    """Returns the file of a ``weights`` option that is a path, or ``None`` for ``"random"``.

    Raises:
        OptionError: The option is neither.
        WeightsError: The file does not exist.
    """
    if option == RANDOM:
        return None
    if not option.endswith(WEIGHTS_SUFFIXES):
        raise OptionError(
            f"weights={option!r} is not known for {model_name!r}: "
            f"use 'DEFAULT', 'random', or a path that ends in {', '.join(WEIGHTS_SUFFIXES)}"
        )
    path = expanded(option)
    if not path.is_file():
        raise WeightsError(f"weights={option!r}: no such file")
    return path


def with_weights(source: ModelSource, preprocessing: Preprocessing | Tokenization, weights: Path | None) -> nn.Module:
    """Builds a model with its weights.

    Args:
        source: The source that builds the model.
        preprocessing: The preprocessing of the model's input.
        weights: The weights file; ``None`` for random weights, identical on every machine.

    Raises:
        WeightsError: The weights belong to another model.
    """
    if weights is None:
        with seeded():
            return source.build(preprocessing)
    state_dict = load_state_dict(weights)
    with no_random_init():
        model = source.build(preprocessing)
    if isinstance(model, torchvision.models.DenseNet):
        # torchvision's files use the original names: norm.1 is now norm1.
        state_dict = {
            re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key): value
            for key, value in state_dict.items()
        }
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        first = " ".join(" ".join(str(error).splitlines()[1:4]).split())[:500]
        raise WeightsError(f"the weights do not fit {source.name!r}: {first}") from error
    return model


@contextmanager
def seeded() -> Iterator[None]:
    """Seeds PyTorch's random numbers within the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def save_state_dict(model: nn.Module) -> Path:
    """Saves a model's weights as safetensors in the user's cache."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().clone().contiguous() for name, value in model.state_dict().items()
    }
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with cache.temporary_folder(needed_bytes) as folder:
        path = folder / "weights.safetensors"
        save_file(tensors, path)
        return cache.store(path, move=True)


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Loads the tensors of a weights file on the CPU.

    Args:
        path: A ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file. It may be a checkpoint with
            the weights under ``state_dict`` or ``model``.

    Raises:
        WeightsError: The file contains anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling corrupt bytes raises arbitrary exceptions
        raise WeightsError(f"{path.name} is not a weights file: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(v, torch.Tensor) for v in loaded.values()
    ):
        raise WeightsError(f"{path.name} is not a weights file: it contains no state_dict")
    nn.modules.utils.consume_prefix_in_state_dict_if_present(loaded, "module.")
    return loaded


class no_memory(TorchFunctionMode):  # noqa: N801, a context manager
    """Creates the weights of modules on PyTorch's ``meta`` device, where tensors have only a shape.

    ``torch.device("meta")`` would also affect the tensors from which RegNets compute their widths.
    """

    _OF_WEIGHTS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._OF_WEIGHTS:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


class no_random_init(TorchFunctionMode):  # noqa: N801, a context manager
    """Initialises modules with zeros, because random numbers take most of the build time.

    The values must be set: ``nn.init.trunc_normal_`` redraws until all are in its range.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))
