"""``.pt2`` files written by ``torch.export.save``, which contain a model's graph and weights.

``model="path/to/model.pt2"`` runs a file. Its program takes normalised float32 ``(N, 3, H, W)`` for
any N and returns features ``(N, D)``. It runs on PyTorch, not on OpenVINO. Export the model in
evaluation mode:

    batch = torch.export.Dim("batch")
    images = torch.zeros(2, 3, 224, 224)
    program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, "model.pt2")

Loading a ``.pt2`` file can run code that it contains. ``torch.export.load`` unpickles parts of the
file without restriction (example inputs, opaque constants), evaluates text expressions (shapes, by
SymPy) and opens packaged compiled libraries, and the graph may name any function of ``torch``. Only
use ``.pt2`` files from people whose code you would run. The SHA-256 of a shipped file detects
corruption, not tampering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import OptionError, WeightsError
from imagevec.files import expanded
from imagevec.models.source import IMAGENET, ModelSource
from imagevec.options import RANDOM
from imagevec.spec import Preprocessing, Tokenization

if TYPE_CHECKING:
    from torch import nn

PREFIX = ""
SUFFIX = ".pt2"


def find(model: Any) -> ExportedSource | None:
    """Returns the source of a path that ends in ``.pt2``.

    Raises:
        OptionError: The file does not exist.
    """
    if not isinstance(model, str | Path) or not str(model).endswith(SUFFIX):
        return None
    path = expanded(model).absolute()
    if not path.is_file():
        raise OptionError(f"model={str(model)!r}: no such file")
    return ExportedSource(path)


def names(part: str = "") -> list[str]:
    """Returns no names: files are given by path."""
    return []


@dataclass(frozen=True)
class ExportedSource(ModelSource):
    """A file written by ``torch.export.save`` with a program that returns features."""

    path: Path
    preset: Preprocessing | None = None
    registered_name: str | None = None

    backends = ("torch",)  # tracing would fix the batch size
    identity = "file"
    infers_shapes = False
    contains_weights = True

    @property
    def name(self) -> str:
        return self.registered_name or f"pt2:{self.path.stem}"

    def files(self, weights: str) -> list[Path]:
        return [self.path]

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        raise OptionError(
            f"a featurizer with model={str(self.path)!r} cannot be saved: it can contain code"
        )

    def check(self, layer: str | tuple[str, ...]) -> None:
        if layer != "pooled":
            raise OptionError(
                f"layer={layer!r} is not valid: a .pt2 file only provides its output, use 'pooled'"
            )

    def weights(self, option: str) -> Path | nn.Module | None:
        if option != "DEFAULT":
            raise OptionError(f"weights={option!r} is not valid: {self.path.name} contains weights")
        return self.path

    def has_weights(self) -> bool:
        return True

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """Returns the registered preprocessing, or torchvision's preset in the input size."""
        size = _input_size(self.path)
        if self.preset is None:
            return IMAGENET.with_input_size(size or IMAGENET.crop_size)
        if size not in (None, self.preset.crop_size):
            raise OptionError(
                f"crop_size={self.preset.crop_size} is not valid: {self.path.name} takes {size}"
            )
        return self.preset

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        if _input_size(self.path) is not None:
            return super().resized(preprocessing, input_size)
        return preprocessing.with_input_size(input_size)

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        return load(self.path)

    def module(
        self, preprocessing: Preprocessing | Tokenization, weights: Path | None
    ) -> nn.Module:
        return load(weights or self.path)  # on a worker the file has another path


def _input_size(path: Path) -> int | tuple[int, int] | None:
    """Returns the size of a program's input in pixels, or ``None`` if it accepts any.

    Raises:
        OptionError: The input is not float32 ``(N, 3, H, W)`` for any N.
        WeightsError: The file was not written by ``torch.export.save``.
    """
    import torch

    program = _load(path)
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.name in program.graph_signature.user_inputs
    ]
    if [(value.dtype, value.ndim) for value in inputs] != [(torch.float32, 4)]:
        raise OptionError(f"{path.name} is not valid: its input is not one float32 (N, 3, H, W)")
    count, channels, height, width = inputs[0].shape
    shape = tuple(inputs[0].shape)
    if isinstance(count, int):
        raise OptionError(
            f"{path.name} only takes batches of {count}: export it with "
            "dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    if channels != 3:
        raise OptionError(f"{path.name} is not valid: its input is {shape}, not (N, 3, H, W)")
    sides = [side for side in (height, width) if isinstance(side, int)]
    if len(set(sides)) == 2:
        return height, width
    return sides[0] if sides else None


def load(path: Path) -> nn.Module:
    """Loads the program as a module that accepts any memory layout.

    Raises:
        WeightsError: The file was not written by ``torch.export.save``.
    """
    import torch
    from torch import fx

    module = _load(path).module()
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # view rejects channels_last
            node.target = torch.ops.aten.reshape.default
    return fx.GraphModule(module, module.graph)  # the class of program.module() rejects eval()


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:  # corrupt bytes raise arbitrary exceptions
        raise WeightsError(f"{path.name} is not a torch.export file: {error}") from error
