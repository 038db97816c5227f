"""The classification models of ``torchvision.models``."""

from __future__ import annotations

import os
import urllib.error
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import OptionError, WeightsError, did_you_mean
from imagevec.files import digest_of
from imagevec.models.source import REGISTERED, ModelSource
from imagevec.models.weights import local_file
from imagevec.options import RANDOM, WEIGHTS_SUFFIXES, names_file
from imagevec.spec import Preprocessing, Tokenization

if TYPE_CHECKING:
    import torch
    from torch import nn


PREFIX = ""


def find(model: Any) -> ModelSource | None:
    """Returns the source of any name. Whether it exists is checked later, because that is slow."""
    if not isinstance(model, str) or os.sep in model:
        return None
    return TorchvisionSource(model)


def names(part: str = "") -> list[str]:
    """Returns the names that contain ``part``."""
    import torchvision.models

    listed = torchvision.models.list_models(module=torchvision.models)
    return [name for name in listed if part.casefold() in name]


@dataclass(frozen=True)
class TorchvisionSource(ModelSource):
    """A model of ``torchvision.models``."""

    torchvision_name: str

    libraries = ("torch", "torchvision")

    @property
    def name(self) -> str:
        return self.torchvision_name

    @property
    def weights_enum(self) -> Any:
        """The enum of the pretrained weights, with their presets and URLs."""
        import torchvision.models

        return torchvision.models.get_model_weights(self.name)

    def check(self, layer: str | tuple[str, ...]) -> None:
        known = names()
        if self.name not in known:
            near = did_you_mean(self.name, [*REGISTERED, *known])
            raise OptionError(f"model={self.name!r} is not known: {near}")

    def weights(self, option: str) -> Path | nn.Module | None:
        members = self.weights_enum.__members__
        if option == RANDOM or names_file(option):
            return local_file(self.name, option)
        if option not in members:
            near = did_you_mean(option, [*members, RANDOM])
            raise OptionError(
                f"weights={option!r} is not known for {self.name!r}: {near}; "
                f"or use a path that ends in {', '.join(WEIGHTS_SUFFIXES)}"
            )
        return self._downloaded(members[option])

    def has_weights(self) -> bool:
        return os.path.exists(_hub_path(self.weights_enum.DEFAULT))

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """Converts the preset of the weights entry (``torchvision/transforms/_presets.py``).

        Random weights and weights from elsewhere use the preset of the default entry.
        """
        entry = self.weights_enum.DEFAULT
        for candidate in self.weights_enum:
            # File names of torch.hub end with the first digits of the SHA-256.
            if weights_digest and weights_digest.startswith(
                Path(candidate.url).stem.split("-")[-1]
            ):
                entry = candidate
        preset = entry.transforms()
        return Preprocessing(
            resize_size=preset.resize_size[0],
            crop_size=preset.crop_size[0],
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation.value,
        )

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        """Keeps the ratio of the preset's ``resize_size`` to its ``crop_size``.

        A shorter side that keeps the ratio would not cover every crop that is not square. So the
        resized image covers both sides, as in timm.
        """
        if self.name.startswith("vit_") and isinstance(input_size, tuple):
            raise OptionError(
                f"input_size={input_size!r} is not valid: {self.name!r} only takes squares, such "
                f"as {preprocessing.input_size}; timm's Vision Transformers take other sizes"
            )
        return preprocessing.with_input_size(input_size)

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        import torchvision.models

        kwargs: dict[str, Any] = {}
        if self.name in ("googlenet", "inception_v3"):
            # torchvision sets these to load its weights, which expect another input scale.
            kwargs = {"transform_input": True, "init_weights": False}
        elif self.name.startswith("vit_"):
            kwargs = {"image_size": preprocessing.input_size}
        elif self.name.startswith("maxvit_"):
            kwargs = {"input_size": preprocessing.input_shape}
        model: nn.Module = torchvision.models.get_model(self.name, weights=None, **kwargs)
        return model

    def fitted(
        self,
        tensors: dict[str, torch.Tensor],
        model: nn.Module,
        preprocessing: Preprocessing | Tokenization,
        weights: Path,
    ) -> dict[str, torch.Tensor]:
        """Interpolates position embeddings with torchvision's ``interpolate_embeddings``."""
        from torchvision.models.vision_transformer import interpolate_embeddings

        key = "encoder.pos_embedding"
        if key not in tensors or tensors[key].shape == model.state_dict()[key].shape:
            return tensors
        if preprocessing.input_size == self.preprocessing(digest_of(weights)).input_size:
            return tensors  # they do not fit: they are for another size, which was not chosen
        patch_size: Any = model.patch_size
        size: Any = preprocessing.input_size  # of a square
        fitted: dict[str, torch.Tensor]
        fitted = interpolate_embeddings(size, patch_size, OrderedDict(tensors))
        return fitted

    def _downloaded(self, entry: Any) -> Path:
        """Returns the weights file in torch.hub's folder, and downloads it if needed."""
        import torch

        from imagevec.models.state_dict import OFFLINE

        path = _hub_path(entry)
        if not os.path.exists(path):  # also where the folder may not be read
            hash_prefix = path.stem.rpartition("-")[2]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(entry.url, str(path), hash_prefix, progress=False)
            except (urllib.error.URLError, OSError, RuntimeError) as error:
                raise WeightsError(
                    f"cannot download {entry} of {self.name} from {entry.url} ({error}). "
                    f"{OFFLINE}, or put {path.name} in {path.parent}"
                ) from error
        return path


def _hub_path(weights_entry: Any) -> Path:
    import torch

    name: str = weights_entry.url.rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / name
