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

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from imagevec.errors import OptionError, WeightsError
from imagevec.models.entry import IMAGENET
from imagevec.options import RANDOM
from imagevec.spec import Preprocessing

if TYPE_CHECKING:
    from torch import nn

PREFIX = ""
SUFFIX = ".pt2"


def find(model: Any) -> ExportedSource | None:
    """The source of a path with the suffix.

    Raises:
        OptionError: There is no such file.
    """
    if not isinstance(model, str | Path) or not str(model).endswith(SUFFIX):
        return None
    path = Path(model).expanduser().absolute()
    if not path.is_file():
        raise OptionError(f"model={str(model)!r}: there is no such file")
    return ExportedSource(path)


def names(part: str = "") -> list[str]:
    """None: files are where they are."""
    return []


@dataclass(frozen=True)
class ExportedSource:
    """A file of ``torch.export.save``, whose output is the features."""

    path: Path
    preset: Preprocessing | None = None
    registered_name: str | None = None

    backends: ClassVar[tuple[str, ...]] = ("torch",)  # tracing it would fix the size of a batch
    identity: ClassVar[Literal["file"]] = "file"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    infers_shapes: ClassVar[bool] = False
    beside_weights: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return self.registered_name or f"pt2:{self.path.stem}"

    def why_not_saved(self) -> str | None:
        return f"a featurizer with model={str(self.path)!r} cannot be saved: it can hold code"

    def check(self, layer: str | tuple[str, ...]) -> None:
        if layer != "pooled":
            raise OptionError(
                f"layer={layer!r} is not valid: a .pt2 file has its output alone, use 'pooled'"
            )

    def weights(self, option: str) -> Path | nn.Module | None:
        if option != "DEFAULT":
            raise OptionError(f"weights={option!r} is not valid: {self.path.name} has its own")
        return self.path

    def has_weights(self) -> bool:
        return True

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """What was registered, else torchvision's preset for the program's input size."""
        size = input_size(self.path)
        if self.preset is None:
            crop_size = size or IMAGENET.crop_size
            # 256 to 224, as torchvision's
            return Preprocessing(resize_size=math.floor(crop_size / 0.875), crop_size=crop_size)
        if size not in (None, self.preset.crop_size):
            raise OptionError(
                f"crop_size={self.preset.crop_size} is not valid: {self.path.name} takes {size}"
            )
        return self.preset

    def build(self, crop_size: int) -> nn.Module:
        return load(self.path)

    def module(self, crop_size: int, weights: Path | None) -> nn.Module:
        return load(weights or self.path)  # on a worker the file is at another place


def input_size(path: Path) -> int | None:
    """The side of a program's input, S, in pixels; ``None`` if it takes any.

    Raises:
        OptionError: Its input is not float32 ``(N, 3, S, S)`` for any N.
        WeightsError: The file is not of ``torch.export.save``.
    """
    import torch

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
    import torch
    from torch import fx

    module = _load(path).module()
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # it refuses channels_last
            node.target = torch.ops.aten.reshape.default
    return fx.GraphModule(module, module.graph)  # program.module()'s own refuses eval()


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:  # damaged bytes raise whatever comes up
        raise WeightsError(f"{path.name} is not a file of torch.export.save: {error}") from error
