"""Custom models: a zero-argument factory, passed as ``model`` or registered under a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec.errors import OptionError, SerializationError
from imagevec.models.source import IMAGENET, REGISTERED, ModelSource
from imagevec.models.weights import local_file
from imagevec.options import RANDOM
from imagevec.pickling import check_pickle, dumps, forbidden_kind, loads, missing_module
from imagevec.spec import Preprocessing, Tokenization

if TYPE_CHECKING:
    from torch import nn

    ModelFactory = Callable[[], nn.Module]
else:
    ModelFactory = Callable[[], Any]


PREFIX = ""


def find(model: Any) -> ModelSource | None:
    """Returns the source of a registered name or of a factory.

    Raises:
        OptionError: The model is a live module.
        SerializationError: The factory captures an object that must not be pickled, for example a
            session.
    """
    if isinstance(model, str) and model in REGISTERED:
        return REGISTERED[model]
    if not callable(model):
        return None
    check(model)
    return FactorySource(model)


def names(part: str = "") -> list[str]:
    """Returns the registered names that contain ``part``."""
    return [name for name in REGISTERED if part.casefold() in name.casefold()]


def check(factory: Any) -> None:
    """Raises an error unless workers can call ``factory``."""
    if forbidden_kind(factory) == "nn.Module":
        raise OptionError(
            "model is a live nn.Module, which would be pickled into every task: "
            "use a zero-argument factory, a function that returns it"
        )
    check_pickle(factory)


@dataclass(frozen=True)
class FactorySource(ModelSource):
    """A zero-argument factory that returns an ``nn.Module``."""

    factory: ModelFactory
    preset: Preprocessing = IMAGENET
    registered_name: str | None = None

    identity = "content"
    libraries = ("torch", "torchvision")
    infers_shapes = False  # the model's code may depend on pixel values

    @property
    def name(self) -> str:
        if self.registered_name:
            return self.registered_name
        qualname = getattr(self.factory, "__qualname__", type(self.factory).__qualname__)
        return f"factory:{self.factory.__module__}.{qualname}"

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        if self.registered_name:
            return super().to_save(weights, own)
        raise OptionError(
            f"a featurizer with a factory, model={self.factory!r}, cannot be saved, because "
            "loading it would run saved code: register the factory with register_model and use "
            "its name as model, or use the folder of a saved model"
        )

    def check(self, layer: str | tuple[str, ...]) -> None:
        """Accepts any layer: the layers are only known once the model is built."""

    def weights(self, option: str) -> Path | nn.Module | None:
        from imagevec.models.checks import check_weights

        if option != "DEFAULT":
            return local_file(self.name, option)
        model = self.build(self.preset)
        check_weights(model)
        return model

    def has_weights(self) -> bool:
        return True

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        return self.preset

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        return preprocessing.with_input_size(input_size)

    def code(self, module: nn.Module) -> str:
        from imagevec.models.content import code_digest

        return code_digest(self.factory, module)

    def __reduce__(self) -> Any:
        return _loaded, (dumps(self.factory), self.preset, self.registered_name)

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        from torch import nn

        try:
            model = self.factory()
        except ModuleNotFoundError as error:
            raise SerializationError(f"{self.name!r} needs {missing_module(error)}") from error
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"the factory of {self.name!r} is not valid: "
                f"it returned {type(model).__name__}, not a torch.nn.Module"
            )
        return model


def _loaded(data: bytes, preset: Preprocessing, registered_name: str | None) -> FactorySource:
    return FactorySource(loads(data), preset, registered_name)
