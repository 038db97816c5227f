"""The protocol of model sources, and the models that users registered.

Each kind of source is a module of this package, listed in ``registry.SOURCES``, with the following
members. ``find(model)`` returns the source of a ``model`` option, or ``None`` for another kind. It
is fast: sources import PyTorch only to build a model, so a cached plan never imports it.
``names(part)`` returns the names that contain a text. ``PREFIX`` is the prefix of the names, or
empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from imagevec.options import RANDOM
from imagevec.spec import Preprocessing

if TYPE_CHECKING:
    from torch import nn

IMAGENET = Preprocessing()


class ModelSource(Protocol):
    """One model, as used by plans, workers, pipelines and the command line."""

    @property
    def name(self) -> str:
        """The value of ``FeatureSpec.model``."""

    @property
    def backends(self) -> tuple[str, ...]:
        """The ``imagevec.options.ENGINES`` that can run the model."""

    @property
    def identity(self) -> Literal["name", "file", "content"]:
        """What identifies the model in cached plans and saved pipelines.

        ``"name"``: the names of the model and its weights, on any machine with the library.
        ``"file"``: the weights file. ``"content"``: the module that a factory builds.
        """

    @property
    def libraries(self) -> tuple[str, ...]:
        """The packages that build the model. A new version of one invalidates cached plans."""

    @property
    def infers_shapes(self) -> bool:
        """Whether PyTorch's ``meta`` device can infer the shapes without computing."""

    @property
    def beside_weights(self) -> tuple[str, ...]:
        """The names of files next to a weights file that describe how to use it."""

    def why_not_saved(self) -> str | None:
        """Returns the reason why a pipeline with the model cannot be saved, or ``None``."""

    def check(self, layer: str | tuple[str, ...]) -> None:
        """Raises ``OptionError`` if the model, or as far as is known the layer, does not exist."""

    def weights(self, option: str) -> Path | nn.Module | None:
        """Resolves a ``weights`` option to a local file, or to ``None`` for random weights.

        Returns a module if the weights come with a module.

        Raises:
            OptionError: The model has no weights with this name.
            WeightsError: The file does not exist, or the download failed.
        """

    def has_weights(self) -> bool:
        """Returns whether the default weights are on this machine."""

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """Returns the preprocessing that the weights were trained with.

        The source of a text tower returns a ``Tokenization``.

        Args:
            weights_digest: The SHA-256 of the weights file.
            weights: The ``weights`` option.
        """

    def build(self, crop_size: int) -> nn.Module:
        """Builds a model that takes ``(N, 3, crop_size, crop_size)``, or tokens for texts.

        The model may be in training or evaluation mode.
        """

    def module(self, crop_size: int, weights: Path | None) -> nn.Module:
        """Builds the model with the weights of a file, or with random weights for ``None``.

        Raises:
            WeightsError: The weights belong to another model.
        """


REGISTERED: dict[str, ModelSource] = {}
"""The sources added by ``register_model``, by name."""
