"""timm models, named ``timm/<name>``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import MissingExtraError, OptionError, WeightsError, did_you_mean
from imagevec.models.source import ModelSource
from imagevec.options import RANDOM
from imagevec.spec import Preprocessing, Tokenization, height_and_width

if TYPE_CHECKING:
    import torch
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
        return self._preprocessing({})

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        return self._preprocessing({"input_size": (3, *height_and_width(input_size))})

    def _preprocessing(self, options: dict[str, Any]) -> Preprocessing:
        """Returns the preprocessing of ``resolve_data_config`` with these options."""
        config = _timm().data.resolve_data_config(options, self._pretrained_cfg.to_dict())
        if config["crop_mode"] not in ("center", "squash"):
            raise OptionError(
                f"the data config of {self.name!r} is not supported ({config}): only models with "
                "a crop_mode of 'center' or 'squash' are"
            )
        _, *crop_size = config["input_size"]
        height, width = (math.floor(side / config["crop_pct"]) for side in crop_size)
        return Preprocessing(
            resize_size=(height, width),
            crop_size=tuple(crop_size),
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            squash=config["crop_mode"] == "squash",
        )

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        return self._created(preprocessing, pretrained=False)

    def fitted(
        self,
        tensors: dict[str, torch.Tensor],
        model: nn.Module,
        preprocessing: Preprocessing | Tokenization,
        weights: Path,
    ) -> dict[str, torch.Tensor]:
        """Resamples the weights as timm does when it loads pretrained ones."""
        if not self._size_options(preprocessing):
            return tensors
        own, head = model.state_dict(), self._pretrained_cfg.classifier
        heads = (head,) if isinstance(head, str) else tuple(head or ())
        known = {
            name: tensor
            for name, tensor in tensors.items()
            if name in own and name.rpartition(".")[0] not in heads  # it may have other classes
        }
        overlay = {"state_dict": {**own, **known}, "source": "", "custom_load": False}
        try:
            resampled = self._created(
                preprocessing, pretrained=True, pretrained_cfg_overlay=overlay
            ).state_dict()
        except RuntimeError as error:
            first = " ".join(str(error).splitlines()[1:2]).strip()
            raise OptionError(
                f"input_size={preprocessing.input_size!r} is not valid: timm cannot resize the "
                f"weights of {self.name!r}, which take {self.preprocessing(None).input_size} "
                f"({first})"
            ) from error
        return {**tensors, **{name: resampled[name] for name in known}}

    def _created(self, preprocessing: Preprocessing | Tokenization, **options: Any) -> nn.Module:
        options |= self._size_options(preprocessing)
        model: nn.Module = _timm().create_model(self.timm_name, **options)
        return model

    def _size_options(self, preprocessing: Preprocessing | Tokenization) -> dict[str, Any]:
        """Returns timm's option for another input size. Other models take any size as they are."""
        is_own = preprocessing.input_size == self.preprocessing(None).input_size
        if is_own or not self._pretrained_cfg.fixed_input_size:
            return {}
        return {"img_size": preprocessing.input_shape}

    @property
    def _pretrained_cfg(self) -> Any:
        return _timm().get_pretrained_cfg(self.timm_name)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    return timm
