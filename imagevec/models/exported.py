"""``.pt2`` files, of ``torch.export.save``: a model's graph and its weights in one.

``model="path/to/model.pt2"`` runs one. Its program takes normalised float32 ``(N, 3, S, S)``, for
any N, and returns the features, ``(N, D)``. PyTorch runs it, not OpenVINO. It is exported in
evaluation mode:

    batch = torch.export.Dim("batch")
    images = torch.zeros(2, 3, 224, 224)
    program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, "model.pt2")

Loading such a file can run code that is in it. ``torch.export.load`` unpickles parts of it without
restriction (example inputs, opaque constants), evaluates expressions that are in it as text (of
shapes, by SymPy), opens compiled libraries that are packed into it, and its graph may name any
function of ``torch``. Take ``.pt2`` files only from people from whom you would take code. The
SHA-256 by which a file travels tells damage on the way, not malice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from imagevec.errors import OptionError, WeightsError

SUFFIX = ".pt2"


def is_exported(model: object) -> bool:
    """Whether a ``model`` option is the path of an exported program."""
    return isinstance(model, str | Path) and str(model).endswith(SUFFIX)


def input_size(path: Path) -> int | None:
    """The side of a program's input, S, in pixels; ``None`` if it takes any.

    Raises:
        OptionError: Its input is not float32 ``(N, 3, S, S)`` for any N.
        WeightsError: The file is not of ``torch.export.save``.
    """
    program = _load(path)
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.name in program.graph_signature.user_inputs
    ]
    if [(value.dtype, value.ndim) for value in inputs] != [(torch.float32, 4)]:
        raise OptionError(f"{path.name} is not valid: its input is not one float32 (N, 3, S, S)")
    count, channels, height, width = inputs[0].shape
    shape = tuple(inputs[0].shape)
    if isinstance(count, int):
        raise OptionError(
            f"{path.name} takes batches of {count} alone: export it with "
            "dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    sides = [side for side in (height, width) if isinstance(side, int)]
    if channels != 3 or len(set(sides)) > 1:
        raise OptionError(f"{path.name} is not valid: its input is {shape}, not (N, 3, S, S)")
    return sides[0] if sides else None


def load(path: Path) -> nn.Module:
    """The program as a module that takes any memory layout.

    Raises:
        WeightsError: The file is not of ``torch.export.save``.
    """
    module = _load(path).module()
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # it refuses channels_last
            node.target = torch.ops.aten.reshape.default
    return fx.GraphModule(module, module.graph)  # program.module()'s own refuses eval()


def _load(path: Path) -> Any:
    try:
        return torch.export.load(path)
    except Exception as error:  # damaged bytes raise whatever comes up
        raise WeightsError(f"{path.name} is not a file of torch.export.save: {error}") from error
