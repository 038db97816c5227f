"""Combines a model, its weights and a layer into a module that returns features, and a spec."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import ImageVecError, OptionError
from imagevec.files import digest_of
from imagevec.options import RANDOM
from imagevec.spec import FeatureSpec, Preprocessing, Tokenization

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagevec.models.source import ModelSource

logger = logging.getLogger(__name__)


class FeatureModel:
    """The model that options describe, on the driver. Each part is computed on first use.

    Args:
        source: The model source.
        weights: The ``weights`` option.
        layer: The ``layer`` option.
        normalize: The ``normalize`` option.
        input_size: The ``input_size`` option.

    Raises:
        OptionError: On use: the model, its weights or the layer does not exist, or the model does
            not take inputs of this size.
        WeightsError: On use: the weights cannot be loaded.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        weights: str,
        layer: str | tuple[str, ...],
        normalize: bool,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        self.source = source
        self.weights = weights
        self.layer = layer
        self.normalize = normalize
        self._input_size = input_size
        self._built: nn.Module | None = None

    @property
    def options(self) -> tuple[Any, ...]:
        """The options that prepared files depend on, apart from the weights."""
        return (self.layer, self.normalize, self._input_size)

    @functools.cached_property
    def weights_file(self) -> Path | None:
        """The path of the weights; ``None`` for random weights."""
        self.source.check(self.layer)
        found = self.source.weights(self.weights)
        if found is None or isinstance(found, Path):
            return found
        from imagevec.models.state_dict import save_state_dict

        self._built = found
        return save_state_dict(found)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing | Tokenization:
        """The preprocessing of the model's input."""
        own = self._own_preprocessing
        if self._input_size is not None and own.input_size != self._input_size:
            own = self.source.resized(own, self._input_size)
            self._built = None  # its size is the model's own
        return own

    @functools.cached_property
    def _own_preprocessing(self) -> Preprocessing:
        digest = digest_of(self.weights_file) if self.weights_file else None
        return self.source.preprocessing(digest, self.weights)

    @property
    def weights_name(self) -> str:
        """The value of ``FeatureSpec.weights``."""
        return f"sha256:{digest_of(self.weights_file)}" if self.weights_file else RANDOM

    @functools.cached_property
    def content(self) -> str:
        """A digest of what the model computes, before layers are selected."""
        from imagevec.models.content import content_digest

        self._built = self._take_module()
        return content_digest((self.code, self._built))

    @functools.cached_property
    def code(self) -> str:
        """The value of ``FeatureSpec.code``."""
        if self.source.identity != "content":
            return self.source.config_digest
        self._built = self._take_module()
        return self.source.code(self._built)

    @functools.cached_property
    def module(self) -> nn.Module:
        """The module from ``example_input`` to ``(N, D)``, in evaluation mode.

        Raises:
            OptionError: The layer does not exist. The message lists the nearest layers.
            WeightsError: The weights belong to another model.
        """
        model = self._take_module()
        features = _to_features(self.source, model, self.layer, self.normalize, self.preprocessing)
        dropped = getattr(features, "dropped", "")
        if dropped and self.source.identity == "content":  # a factory's own layer
            logger.warning("dropped the last layer %s; layer='logits' keeps it", dropped)
        return features

    def _take_module(self) -> nn.Module:
        preprocessing, file = self.preprocessing, self.weights_file
        built, self._built = self._built, None
        if built is not None:
            return built
        if preprocessing.input_size == self._own_preprocessing.input_size:
            return self.source.module(preprocessing, file)
        return self._resized_module()

    def _resized_module(self) -> nn.Module:
        """Builds the model for an input size that is not its own, and runs it once."""
        import torch

        try:
            module = self.source.module(self.preprocessing, self.weights_file)
            with torch.no_grad():
                module.eval()(example_input(self.preprocessing, 1))
        except ImageVecError:
            raise
        except Exception as error:  # models raise arbitrary exceptions
            first = str(error).strip().partition("\n")[0][:200]
            raise OptionError(
                f"input_size={self._input_size!r} is not valid: {self.source.name!r} cannot run "
                f"it ({type(error).__name__}: {first}); its own size is "
                f"{self._own_preprocessing.input_size}"
            ) from error
        return module

    @functools.cached_property
    def spec(self) -> FeatureSpec:
        """The spec of the vectors, in float32.

        Raises:
            OptionError: The model's output is not a two-dimensional tensor.
        """
        from imagevec.models.layers import infer_num_features

        device = "meta" if self.source.infers_shapes else "cpu"
        example = example_input(self.preprocessing, 1).to(device)
        return self.spec_of(infer_num_features(self.module, example))

    def spec_of(self, sizes: tuple[int, ...]) -> FeatureSpec:
        """Returns the spec for these lengths of the layers' vectors."""
        return FeatureSpec(
            model=self.source.name,
            weights=self.weights_name,
            layer=self.layer,
            num_features=sizes if isinstance(self.layer, tuple) else sizes[0],
            preprocessing=self.preprocessing,
            precision="float32",
            normalize=self.normalize,
            code=self.code,
        )


def feature_module(source: ModelSource, spec: FeatureSpec, weights_file: Path | None) -> nn.Module:
    """Builds the module of a spec on a worker, from ``example_input`` to ``(N, D)``."""
    model = source.module(spec.preprocessing, weights_file)
    return _to_features(source, model, spec.layer, spec.normalize, spec.preprocessing)


def _to_features(
    source: ModelSource,
    model: nn.Module,
    layer: str | tuple[str, ...],
    normalize: bool,
    preprocessing: Preprocessing | Tokenization,
) -> nn.Module:
    from imagevec.models.state_dict import check_loaded

    example = functools.partial(example_input, preprocessing)
    features = source.to_features(model, layer, normalize, example)
    check_loaded(model, features)
    return features


def example_input(preprocessing: Preprocessing | Tokenization, count: int) -> torch.Tensor:
    """Returns zeros in the shape of the input: float32 ``(N, 3, H, W)`` or int32 ``(N, L)``."""
    import torch

    if isinstance(preprocessing, Tokenization):
        return torch.zeros(count, preprocessing.context_length, dtype=torch.int32)
    return torch.zeros(count, 3, *preprocessing.input_shape)
