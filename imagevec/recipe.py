"""Options to a ``Recipe``: all that a worker needs to build its engine. It is made on the driver."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from imagevec.engines import Engine
from imagevec.engines.torch import TorchEngine
from imagevec.errors import OptionError, did_you_mean
from imagevec.models import (
    Entry,
    FactoryEntry,
    build_model,
    find_entry,
    infer_num_features,
    to_feature_model,
)
from imagevec.spec import DEFAULTS, ExecutionOptions, FeatureSpec, Options
from imagevec.weights import RANDOM, content_addressed, digest_of, find_weights, load_state_dict

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Recipe:
    """How to build an engine: a few KB, whatever the model.

    Attributes:
        spec: What to compute.
        entry: How to build the model.
        weights_file: The name of the weights file; ``None`` for random weights.
        key: Equal for two recipes only if one engine serves both.
    """

    spec: FeatureSpec
    entry: Entry
    weights_file: str | None
    key: str

    def build_engine(self, weights_path: Path | None, device: torch.device) -> Engine:
        """Loads the weights, verifies them, and prepares the forward pass on a device.

        Raises:
            WeightsError: The file was altered, or does not fit the model.
        """
        spec = self.spec
        model = build_model(self.entry, spec.preprocessing.crop_size, self._load(weights_path))
        model = to_feature_model(model, spec.layer, spec.normalize)
        return TorchEngine(model, spec.preprocessing, device, spec.precision)

    def _load(self, weights_path: Path | None) -> dict[str, torch.Tensor] | None:
        if weights_path is None:
            return None
        return load_state_dict(weights_path, self.spec.weights.removeprefix("sha256:"))


def resolve(**options: Unpack[Options]) -> tuple[Recipe, Path | None, ExecutionOptions]:
    """Checks all options and decides what ``"auto"`` and ``"DEFAULT"`` mean.

    Returns:
        The recipe, its weights file on this machine, and how to run it.

    Raises:
        OptionError: An option is wrong; the message names the nearest valid choice.
        WeightsError: The weights cannot be had, or do not fit the model.
    """
    for name in options.keys() - DEFAULTS.keys():
        raise OptionError(f"the option {name!r} is not known: {did_you_mean(name, DEFAULTS)}")
    chosen: dict[str, Any] = {**DEFAULTS, **options}
    formats = chosen["formats"]
    execution = ExecutionOptions(
        engine="torch" if chosen["engine"] == "auto" else chosen["engine"],
        device=chosen["device"],
        batch_size=chosen["batch_size"],
        max_pixels=chosen["max_pixels"],
        formats=(formats,) if isinstance(formats, str) else tuple(formats),
        on_error=chosen["on_error"],
        output=chosen["output"],
    )
    if chosen["precision"] == "float16" and execution.device == "cpu":
        raise OptionError("precision='float16' needs CUDA: did you mean 'bfloat16'?")
    entry = find_entry(chosen["model"])
    weights_path = find_weights(chosen["weights"], entry)
    if weights_path is not None:
        weights_path = content_addressed(weights_path)
    spec = _feature_spec(entry, weights_path, chosen)
    key = hashlib.sha256(cloudpickle.dumps((spec, entry))).hexdigest()
    weights_file = weights_path.name if weights_path else None
    return Recipe(spec, entry, weights_file, key), weights_path, execution


def _feature_spec(entry: Entry, weights_path: Path | None, chosen: dict[str, Any]) -> FeatureSpec:
    digest = digest_of(weights_path) if weights_path else None
    preprocessing = entry.preprocessing(digest)
    state_dict = load_state_dict(weights_path, digest) if weights_path and digest else None
    model = build_model(entry, preprocessing.crop_size, state_dict)
    model = to_feature_model(model, chosen["layer"], chosen["normalize"])
    # A registered model's shapes tell; a factory's model is run once, on a black image.
    device = "cpu" if isinstance(entry, FactoryEntry) else "meta"
    return FeatureSpec(
        model=entry.name,
        weights=f"sha256:{digest}" if digest else RANDOM,
        layer=chosen["layer"],
        num_features=infer_num_features(model, preprocessing.crop_size, device),
        preprocessing=preprocessing,
        precision=chosen["precision"],
        normalize=chosen["normalize"],
        decode=chosen["decode"],
    )
