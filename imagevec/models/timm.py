"""timm models, named ``timm/<name>``, or by the files that timm saved.

``timm/local-dir:<folder>`` and ``timm/hf-hub:<owner>/<name>`` have a ``config.json`` with the
architecture and the data config, and a file of weights, as ``timm.models.push_to_hf_hub`` and
``save_for_hf`` write them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import MissingExtraError, OptionError, WeightsError, did_you_mean
from imagevec.models import hub
from imagevec.models.source import ModelSource
from imagevec.models.weights import local_file
from imagevec.options import RANDOM
from imagevec.spec import Preprocessing, Tokenization, height_and_width

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "timm/"

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_NOT_READ: tuple[str, ...] = ("labels", "label_names", "label_descriptions")  # of config.json
_NOT_READ += ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load")


def find(model: Any) -> ModelSource | None:
    """Returns the source of a name with the prefix. Whether it exists is checked later."""
    if not isinstance(model, str) or not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    repository = hub.find(name, PREFIX)
    return TimmSource(name) if repository is None else TimmRepositorySource.of(repository)


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
        from imagevec.models.state_dict import OFFLINE

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
        channels, *crop_size = config["input_size"]
        if channels != 3:
            raise OptionError(f"model={self.name!r} takes {channels} channels, not RGB images")
        height, width = (math.floor(side / config["crop_pct"]) for side in crop_size)
        return Preprocessing(
            resize_size=(height, width),
            crop_size=tuple(crop_size),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
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
        with self._timm_name() as name:
            model: nn.Module = _timm().create_model(name, **options)
        return model

    @contextlib.contextmanager
    def _timm_name(self) -> Iterator[str]:
        """Yields the argument of ``timm.create_model``."""
        yield self.timm_name

    def _size_options(self, preprocessing: Preprocessing | Tokenization) -> dict[str, Any]:
        """Returns timm's option for another input size. Other models take any size as they are."""
        is_own = preprocessing.input_size == self.preprocessing(None).input_size
        if is_own or not self._pretrained_cfg.fixed_input_size:
            return {}
        return {"img_size": preprocessing.input_shape}

    @property
    def _pretrained_cfg(self) -> Any:
        return _timm().get_pretrained_cfg(self.timm_name)


@dataclass(frozen=True)
class TimmRepositorySource(TimmSource):
    """A timm model whose configuration comes with its weights.

    Attributes:
        repository: The files. Workers do not need them.
        config: The content of ``config.json`` without labels and other places of weights.
    """

    repository: hub.Repository
    config: str

    @classmethod
    def of(cls, repository: hub.Repository) -> TimmRepositorySource:
        """Reads the configuration.

        Raises:
            WeightsError: There is none, or it is not timm's.
        """
        content = repository.json(_CONFIG)
        if not isinstance(content.get("architecture"), str):
            raise WeightsError(
                f"{_CONFIG} of {repository.where} is not timm's: it names no 'architecture'"
            )
        if isinstance(content.get("pretrained_cfg"), dict):
            content["pretrained_cfg"] = _without_places(content["pretrained_cfg"])
        config = json.dumps(_without_places(content), sort_keys=True)
        return cls(str(repository), repository, config)

    @property
    def name(self) -> str:
        return self.repository.name

    @property
    def config_digest(self) -> str:
        return hashlib.sha256(self.config.encode()).hexdigest()

    def files(self, weights: str) -> list[Path]:
        config = self.repository.first((_CONFIG,))
        is_own = weights in ("", "DEFAULT")
        return [*([self._weights_file] if is_own else super().files(weights)), config]

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        return self.repository.to_save(weights, own)

    def check(self, layer: str | tuple[str, ...]) -> None:
        architecture = json.loads(self.config)["architecture"]
        if not _timm().is_model(architecture):
            near = did_you_mean(architecture, _timm().list_models())
            raise OptionError(
                f"model={self.name!r}: timm {_timm().__version__} has no architecture "
                f"{architecture!r}: {near}"
            )

    def weights(self, option: str) -> Path | nn.Module | None:
        return self._weights_file if option == "DEFAULT" else local_file(self.name, option)

    @property
    def _weights_file(self) -> Path:
        return self.repository.first(_WEIGHTS)

    def has_weights(self) -> bool:
        return self.repository.kind == "local-dir"

    def _created(self, preprocessing: Preprocessing | Tokenization, **options: Any) -> nn.Module:
        try:
            return super()._created(preprocessing, **options)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # of its model_args
            raise OptionError(
                f"timm cannot build {self.name!r} from {_CONFIG} ({type(error).__name__}: {error})"
            ) from error

    @contextlib.contextmanager
    def _timm_name(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _CONFIG).write_text(self.config)
            yield f"local-dir:{folder}"

    @property
    def _pretrained_cfg(self) -> Any:
        from timm.models._hub import load_model_config_from_path
        from timm.models._pretrained import PretrainedCfg

        with self._timm_name() as name:
            config, _, _ = load_model_config_from_path(name.removeprefix("local-dir:"))
        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        return PretrainedCfg(**{key: value for key, value in config.items() if key in known})


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_READ}


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    return timm
