"""Checks that a model can be used: its weights, its forward pass and its output.

Each message names the layer and what would work.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from imagevec.errors import ImageVecError, OptionError

Module = TypeVar("Module", bound=nn.Module)

_MAX_CHANNELS = 13  # the bands of Sentinel-2


def check_weights(model: nn.Module) -> None:
    """Raises ``OptionError`` unless the weights are initialised, and float32 where they are real.

    A model in another type computes other numbers than its float32 copy.
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise OptionError(
                f"the weights {name!r} of the model have no shape yet: "
                "the factory has to run its model once"
            )
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise OptionError(
                f"the model's weights are {_name(parameter.dtype)} ({name}): return model.float() "
                "from the factory; for a faster forward pass, use precision='bfloat16'"
            )


@contextlib.contextmanager
def trial(layer: str | tuple[str, ...], model: Module, example: torch.Tensor) -> Iterator[Module]:
    """Yields a model to run on an example, for which any error is an ``OptionError``.

    On PyTorch's ``meta`` device, only shapes are computed, by a copy of the model: some models keep
    tensors that they computed.
    """
    if example.is_meta:
        tensors = itertools.chain(model.parameters(), model.buffers())
        model = copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})
    try:
        with torch.device(example.device), torch.inference_mode():
            yield model
    except (ImageVecError, MemoryError):
        raise
    except Exception as error:  # models raise arbitrary exceptions
        raise OptionError(f"layer={layer!r}: {_why(error, model, example)}") from error


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def _why(error: Exception, model: nn.Module, example: torch.Tensor) -> str:
    """Describes why a model cannot run on an example, and what would help."""
    given = f"{_name(example.dtype)} {tuple(example.shape)}"
    channels = _channels(model, example) if example.ndim == 4 else None
    if channels is None:
        first = str(error).strip().partition("\n")[0][:300]
        return (
            f"the model raises {type(error).__name__} for an input of {given}: {first}; "
            "layer='logits' runs the same code. For another size of the input, use "
            "register_model with preprocessing=Preprocessing(crop_size=...)"
        )
    grey = ", for example with images.mean(1, keepdim=True)" if channels == 1 else ""
    return (
        f"the model takes {channels} channel{'s'[: channels - 1]}, not RGB images of {given}: use "
        f"a factory whose forward converts RGB{grey}"
    )


def check_vectors(layer: str | tuple[str, ...], output: Any, count: int) -> None:
    """Raises ``OptionError`` unless an output is float32 ``(N, D)``.

    Args:
        layer: The ``layer`` option.
        output: What the model returns for an example.
        count: The number of images or texts of the example.
    """
    problem = _problem(output, count)
    if problem is not None:
        raise OptionError(f"layer={layer!r}: {problem}")


def _problem(output: Any, count: int) -> str | None:
    if not isinstance(output, torch.Tensor):
        what, choice = _description(output)
        return f"the model returns {what}, not a tensor (N, D){choice}"
    shape = tuple(output.shape)
    kind, cure = {
        0: ("a number", "a vector for each image"),
        1: ("a vector", "(N, 1) or (N, D): squeeze() removes the first dimension of one image"),
        3: ("tokens", "x[:, 0] for a class token or x.mean(1), or use the name of a node as layer"),
        4: ("maps", "x.mean((2, 3)), or use the name of a node as layer"),
    }.get(output.ndim, ("a tensor", "x.flatten(1)"))
    if output.ndim != 2:
        return (
            f"the model returns {kind} of the shape {shape}, not a tensor (N, D): use a factory "
            f"whose forward returns {cure}"
        )
    if output.shape[0] != count:
        return f"the model returns {shape[0]} vectors for a batch of {count}, {shape}, not (N, D)"
    if output.shape[1] == 0:
        return f"the model returns vectors without numbers, {shape}: a model needs an output"
    if output.dtype != torch.float32:
        cure = "end its forward with .float()" if output.is_floating_point() else "return features"
        return f"the model returns {_name(output.dtype)} numbers, not float32: {cure}"
    return None


def _description(output: Any) -> tuple[str, str]:
    """Describes an output that is not a tensor, and how to choose one of its parts."""
    choice = ": use a factory whose forward returns one of them"
    if isinstance(output, dict):
        return f"a dictionary with the keys {', '.join(map(repr, output))}", choice
    if isinstance(output, tuple | list):
        names = [f"{name} " for name in getattr(output, "_fields", [""] * len(output))]
        parts = [
            name.lstrip() + str(tuple(part.shape) if isinstance(part, torch.Tensor) else type(part))
            for name, part in zip(names, output, strict=True)
        ]
        return f"a {type(output).__name__} of {len(parts)} values, {', '.join(parts)}", choice
    return type(output).__name__, ""


def _channels(model: nn.Module, example: torch.Tensor) -> int | None:
    """Returns a number of channels other than 3 that the model accepts, or ``None``."""
    for channels in range(1, _MAX_CHANNELS + 1):
        with contextlib.suppress(Exception), torch.device(example.device), torch.inference_mode():
            model(example[:, :1].repeat(1, channels, 1, 1))
            if channels != 3:
                return channels
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
