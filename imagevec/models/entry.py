"""Where a model comes from: the one protocol of this wing, and the names that users registered.

A source is one module of this folder that ``registry.SOURCES`` lists. ``find(model)`` is the source
of a ``model`` option, or ``None`` if it is not of this kind; it is quick, so that a plan that is
remembered imports no PyTorch: sources import theirs where they build a model, not before.
``names(part)`` are the names that hold a text, and ``PREFIX`` is what they begin with, or empty.
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
    """One model: all that plans, workers, pipelines and the command line ask of it."""

    @property
    def name(self) -> str:
        """What ``FeatureSpec.model`` holds."""

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of ``imagevec.options.ENGINES`` that can run it."""

    @property
    def identity(self) -> Literal["name", "file", "content"]:
        """What says that two are the same model, to remember plans and to save pipelines by.

        Its names, of model and weights, wherever its library is installed; or the weights file; or,
        for a factory, no less than the module that it builds.
        """

    @property
    def libraries(self) -> tuple[str, ...]:
        """The packages that build it: with another version of one, a plan is made anew."""

    @property
    def infers_shapes(self) -> bool:
        """Whether its shapes are known from PyTorch's ``meta`` device, without computing."""

    @property
    def beside_weights(self) -> tuple[str, ...]:
        """The names of files in the folder of a weights file that say how to use it."""

    def why_not_saved(self) -> str | None:
        """Why a pipeline with it cannot be saved, for a person; ``None`` if it can."""

    def check(self, layer: str | tuple[str, ...]) -> None:
        """Raises ``OptionError`` if there is no such model, or, as far as is known, layer."""

    def weights(self, option: str) -> Path | nn.Module | None:
        """What a ``weights`` option means: a local file, or ``None`` for random ones.

        Or a module, where it is the module that comes with them.

        Raises:
            OptionError: The model has no weights of that name.
            WeightsError: The file does not exist, or the download failed.
        """

    def has_weights(self) -> bool:
        """Whether its default weights are on this machine."""

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """What the weights were trained for; the source of a text tower returns ``Tokenization``.

        Args:
            weights_digest: The SHA-256 of their file.
            weights: The option.
        """

    def build(self, crop_size: int) -> nn.Module:
        """A new model for ``(N, 3, crop_size, crop_size)``, in no particular mode.

        One of texts takes tokens instead.
        """

    def module(self, crop_size: int, weights: Path | None) -> nn.Module:
        """The model with its weights, random ones if there is no file.

        Raises:
            WeightsError: The weights are of another model.
        """


REGISTERED: dict[str, ModelSource] = {}
"""What ``register_model`` added, by name."""
