"""timm models, named ``timm/<name>``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import MissingExtraError, OptionError, WeightsError, did_you_mean
from imagevec.models.source import ModelSource
from imagevec.options import RANDOM
from imagevec.spec import Preprocessing, Tokenization

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm/"


def find(model: Any) -> ModelSource | None:
    """Returns the source of a name with the prefix. Whether it exists is checked later."""
    if not isinstance(model, str) or not model.startswith(PREFIX):
        return None
    return TimmSource(model.removeprefix(PREFIX))


def names(part: str = "") -> list[str]:
    """Returns the names that contain ``part``, or none if timm is not installed."""
    try:
        listed = _timm().list_models(f"*{part.casefold()}*")
    except MissingExtraError:
        return []
    return [PREFIX + name for name in listed]


@dataclass(frozen=True)
class TimmSource(ModelSource):
    """A timm model; ``timm_name`` has no prefix."""

    timm_name: str

    libraries = ("torch", "timm")

    @property
    def name(self) -> str:
        return PREFIX + self.timm_name

    def check(self, layer: str | tuple[str, ...]) -> None:
        timm = _timm()
        architecture, _, tag = self.timm_name.partition(".")
        tagged = [known for known in timm.list_pretrained() if known.startswith(architecture)]
        if not timm.is_model(architecture) or (tag and self.timm_name not in tagged):
            known_names = tagged if timm.is_model(architecture) else timm.list_models()
            near = did_you_mean(self.name, (PREFIX + known for known in known_names))
            raise OptionError(f"model={self.name!r} is not known: {near}")

    def weights(self, option: str) -> Path | nn.Module | None:
        from imagevec.models.state_dict import OFFLINE, local_file

        if option != "DEFAULT":
            return local_file(self.name, option)
        try:
            model: nn.Module = _timm().create_model(self.timm_name, pretrained=True)
        except (OSError, RuntimeError) as error:  # raised by timm without a network or weights
            raise WeightsError(
                f"cannot download the weights of {self.name} ({error}). {OFFLINE}"
            ) from error
        return model

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """Converts timm's data config, of ``timm/data/config.py`` and ``transforms_factory.py``."""
        pretrained_cfg = _timm().get_pretrained_cfg(self.timm_name).to_dict()
        config = _timm().data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        _, height, width = config["input_size"]
        if height != width or config["crop_mode"] not in ("center", "squash"):
            raise OptionError(
                f"the data config of {self.name!r} is not supported ({config}): only models with "
                "a square input and a crop_mode of 'center' or 'squash' are"
            )
        return Preprocessing(
            resize_size=math.floor(height / config["crop_pct"]),
            crop_size=height,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            squash=config["crop_mode"] == "squash",
        )

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        """Builds the model for the input size in timm's data config."""
        model: nn.Module = _timm().create_model(self.timm_name, pretrained=False)
        return model


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    return timm
