"""Combines a model, its weights and a layer into a module that returns features, and a spec."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from imagevec.files import digest_of
from imagevec.models.content import content_digest
from imagevec.models.source import ModelSource
from imagevec.models.layers import infer_num_features, to_feature_model
from imagevec.models.state_dict import save_state_dict
from imagevec.options import RANDOM
from imagevec.spec import FeatureSpec, Preprocessing, Tokenization, with_decode


class FeatureModel:
    """The model that options describe, on the driver. It is built once, on first use.

    Args:
        source: The model source.
        weights: The ``weights`` option.
        layer: The ``layer`` option.
        normalize: The ``normalize`` option.
        decode: The ``decode`` option.

    Attributes:
        source: The model source.
        weights_file: The path of the weights; ``None`` for random weights.
        preprocessing: The preprocessing of the model's input.

    Raises:
        OptionError: The model, its weights or the layer does not exist.
        WeightsError: The weights cannot be loaded.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        weights: str,
        layer: str | tuple[str, ...],
        normalize: bool,
        decode: Literal["exact", "scaled"],
    ) -> None:
        source.check(layer)
        self.source = source
        self._layer = layer
        self._normalize = normalize
        found = source.weights(weights)
        if isinstance(found, nn.Module):
            self._built: nn.Module | None = found
            self.weights_file: Path | None = save_state_dict(found)
        else:
            self._built = None
            self.weights_file = found
        self._digest = digest_of(self.weights_file) if self.weights_file else None
        self.preprocessing = with_decode(source.preprocessing(self._digest, weights), decode)

    @property
    def weights_name(self) -> str:
        """The value of ``FeatureSpec.weights``."""
        return f"sha256:{self._digest}" if self._digest else RANDOM

    @functools.cached_property
    def content(self) -> str:
        """A digest of what the model computes, before layers are selected."""
        if self._built is None:
            self._built = self._with_weights()
        return content_digest(self._built)

    @functools.cached_property
    def module(self) -> nn.Module:
        """The module from ``example_input`` to ``(N, D)``, in evaluation mode.

        Raises:
            OptionError: The layer does not exist. The message lists the nearest layers.
            WeightsError: The weights belong to another model.
        """
        model, self._built = self._built, None
        if model is None:
            model = self._with_weights()
        return to_feature_model(model, self._layer, self._normalize)

    def _with_weights(self) -> nn.Module:
        return self.source.module(self.preprocessing.input_size, self.weights_file)

    @functools.cached_property
    def spec(self) -> FeatureSpec:
        """The spec of the vectors, in float32.

        Raises:
            OptionError: The model's output is not a two-dimensional tensor.
        """
        device = "meta" if self.source.infers_shapes else "cpu"
        example = example_input(self.preprocessing, 1).to(device)
        sizes = infer_num_features(self.module, example)
        return FeatureSpec(
            model=self.source.name,
            weights=self.weights_name,
            layer=self._layer,
            num_features=sizes if isinstance(self._layer, tuple) else sizes[0],
            preprocessing=self.preprocessing,
            precision="float32",
            normalize=self._normalize,
        )


def feature_module(source: ModelSource, spec: FeatureSpec, weights_file: Path | None) -> nn.Module:
    """Builds the module of a spec on a worker, from ``example_input`` to ``(N, D)``."""
    model = source.module(spec.preprocessing.input_size, weights_file)
    return to_feature_model(model, spec.layer, spec.normalize)


def example_input(preprocessing: Preprocessing | Tokenization, count: int) -> torch.Tensor:
    """Returns zeros in the shape of the input: float32 ``(N, 3, S, S)`` or int32 ``(N, L)``."""
    if isinstance(preprocessing, Tokenization):
        return torch.zeros(count, preprocessing.context_length, dtype=torch.int32)
    return torch.zeros(count, 3, preprocessing.crop_size, preprocessing.crop_size)
