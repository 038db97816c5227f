"""Models of your own: a zero-argument factory, given as ``model`` or registered under a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from imagevec.errors import OptionError
from imagevec.models.entry import IMAGENET, REGISTERED, ModelSource
from imagevec.options import ENGINES, RANDOM
from imagevec.pickling import check_pickle, forbidden_kind
from imagevec.spec import Preprocessing

if TYPE_CHECKING:
    from torch import nn

    ModelFactory = Callable[[], nn.Module]
else:
    ModelFactory = Callable[[], Any]


PREFIX = ""


def find(model: Any) -> ModelSource | None:
    """The source of a registered name, or of a factory.

    Raises:
        OptionError: The model is a live module.
        SerializationError: The factory captures what must not be pickled, a session for example.
    """
    if isinstance(model, str) and model in REGISTERED:
        return REGISTERED[model]
    if not callable(model):
        return None
    check(model)
    return FactorySource(model)


def names(part: str = "") -> list[str]:
    """The registered names that hold ``part``."""
    return [name for name in REGISTERED if part.casefold() in name.casefold()]


def check(factory: Any) -> None:
    """Raises unless workers can call it."""
    if forbidden_kind(factory) == "nn.Module":
        raise OptionError(
            "model is a live nn.Module, which would be pickled into every task: "
            "give a zero-argument factory, a function that returns it"
        )
    check_pickle(factory)


@dataclass(frozen=True)
class FactorySource:
    """A zero-argument factory of an ``nn.Module``."""

    factory: ModelFactory
    preset: Preprocessing = IMAGENET
    registered_name: str | None = None

    backends: ClassVar[tuple[str, ...]] = ENGINES
    identity: ClassVar[Literal["content"]] = "content"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    infers_shapes: ClassVar[bool] = False  # its own code may look at the pixels
    beside_weights: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        if self.registered_name:
            return self.registered_name
        qualname = getattr(self.factory, "__qualname__", type(self.factory).__qualname__)
        return f"factory:{self.factory.__module__}.{qualname}"

    def why_not_saved(self) -> str | None:
        if self.registered_name:
            return None
        return (
            f"a featurizer with a factory, model={self.factory!r}, cannot be saved, since to load "
            "it would be to run saved code: give the factory a name with register_model and that "
            "name as model, or give the folder of a saved model"
        )

    def check(self, layer: str | tuple[str, ...]) -> None:
        """Its layers are known when it is built."""

    def weights(self, option: str) -> Path | nn.Module | None:
        from imagevec.models.state_dict import local_file

        if option != "DEFAULT":
            return local_file(self.name, option)
        return self.build(self.preset.crop_size)

    def has_weights(self) -> bool:
        return True

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        return self.preset

    def build(self, crop_size: int) -> nn.Module:
        from torch import nn

        model = self.factory()
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"the factory of {self.name!r} is not valid: "
                f"it returned {type(model).__name__}, not a torch.nn.Module"
            )
        return model

    def module(self, crop_size: int, weights: Path | None) -> nn.Module:
        from imagevec.models.state_dict import with_weights

        return with_weights(self, crop_size, weights)
