"""A ``weights`` option to one local file, and that file to tensors.

Nothing is unpickled but tensors: ``.pth`` and ``.pt`` files are loaded with ``weights_only=True``,
``.safetensors`` files hold nothing else.
"""

from __future__ import annotations

import tempfile
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagevec.errors import OptionError, WeightsError, did_you_mean
from imagevec.files import cache_dir, content_addressed
from imagevec.models.registry import ExportedEntry, FactoryEntry, TimmEntry, TorchvisionEntry

RANDOM = "random"
SUFFIXES = (".pth", ".pt", ".safetensors")


def find_weights(
    weights: str, entry: TorchvisionEntry | TimmEntry | FactoryEntry | ExportedEntry
) -> Path | None:
    """The local file that a ``weights`` option means, or ``None`` for ``"random"``.

    Pretrained weights are downloaded where they are not in torch.hub's or timm's cache yet.

    Raises:
        OptionError: The model has no weights of that name.
        WeightsError: The file does not exist, or the download failed.
    """
    if isinstance(entry, ExportedEntry):
        if weights != "DEFAULT":
            raise OptionError(f"weights={weights!r} is not valid: {entry.path.name} has its own")
        return entry.path
    if weights == RANDOM:
        return None
    if str(weights).endswith(SUFFIXES):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"weights={weights!r}: there is no such file")
        return path
    if isinstance(entry, TorchvisionEntry):
        return _hub_file(entry, _weights_entry(entry, weights))
    if weights != "DEFAULT":
        raise OptionError(
            f"weights={weights!r} is not known for {entry.name!r}: "
            f"use 'DEFAULT', 'random', or a path that ends in {', '.join(SUFFIXES)}"
        )
    try:
        model = entry.build(0, pretrained=True) if isinstance(entry, TimmEntry) else entry.build(0)
    except (OSError, RuntimeError) as error:  # what timm raises without a network, or weights
        if isinstance(entry, FactoryEntry):
            raise
        raise WeightsError(
            f"cannot download the weights of {entry.name} ({error}). {_OFFLINE}"
        ) from error
    return save_state_dict(model)


def _weights_entry(entry: TorchvisionEntry, weights: str) -> Any:
    """torchvision's entry of a name, ``"DEFAULT"`` or ``"IMAGENET1K_V1"`` for example."""
    names = entry.weights_enum.__members__
    if weights not in names:
        near = did_you_mean(weights, [*names, RANDOM])
        raise OptionError(
            f"weights={weights!r} is not known for {entry.name!r}: {near}; "
            f"or give a path that ends in {', '.join(SUFFIXES)}"
        )
    return names[weights]


def save_state_dict(model: nn.Module) -> Path:
    """Writes a model's weights as safetensors into the user's cache."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().clone().contiguous() for name, value in model.state_dict().items()
    }
    with tempfile.TemporaryDirectory(dir=cache_dir("files")) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(tensors, path)
        return content_addressed(path)


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, on the CPU.

    Args:
        path: A ``.pth``, ``.pt`` or ``.safetensors`` file; a checkpoint that holds its weights
            under ``state_dict`` or ``model`` is opened.

    Raises:
        WeightsError: The file does not hold tensors alone.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises whatever comes up
        raise WeightsError(f"{path.name} is not a file of weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(v, torch.Tensor) for v in loaded.values()
    ):
        raise WeightsError(f"{path.name} is not a file of weights: it holds no state_dict")
    nn.modules.utils.consume_prefix_in_state_dict_if_present(loaded, "module.")
    return loaded


_OFFLINE = (
    "Without a network, give weights='<path>' of a .pth, .pt or .safetensors file, "
    "or weights='random' to test"
)


def _hub_file(entry: TorchvisionEntry, weights_entry: Any) -> Path:
    url: str = weights_entry.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = Path(name).stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise WeightsError(
                f"cannot download {weights_entry} of {entry.name} from {url} ({error}). "
                f"{_OFFLINE}; or put {name} into {path.parent}"
            ) from error
    return path
