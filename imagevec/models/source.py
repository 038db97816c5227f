"""The base class of model sources, and the models that users registered.

Each kind of source is a module of this package, listed in ``registry.SOURCES``, with the following
members. ``find(model)`` returns the source of a ``model`` option, or ``None`` for another kind. It
is fast: sources import PyTorch only to build a model, so a cached plan never imports it.
``names(part)`` returns the names that contain a text. ``PREFIX`` is the prefix of the names, or
empty.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imagevec import cache
from imagevec._version import __version__
from imagevec.errors import ImageVecError, OptionError
from imagevec.files import digest_of, expanded
from imagevec.models.weights import weights_file
from imagevec.options import ENGINES, RANDOM, names_file
from imagevec.spec import FeatureSpec, Preprocessing, Tokenization

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagevec.engines import Backend
    from imagevec.models.features import FeatureModel

IMAGENET = Preprocessing()


class ConversionError(Exception):
    """A backend cannot run a model that another may run."""


@dataclass(frozen=True)
class Prepared:
    """What a backend needs to compute feature vectors.

    Attributes:
        spec: The spec of the vectors. The precision is a saved model's own, else float32.
        files: The names of the files in the user's cache from which the backend loads its engine.
        content: A digest that distinguishes factories whose specs are equal.
    """

    spec: FeatureSpec
    files: tuple[str, ...]
    content: str = ""


class ModelSource(ABC):
    """One model, as used by plans, workers, pipelines and the command line.

    Attributes:
        backends: The ``imagevec.options.ENGINES`` that can run the model.
        identity: What identifies the model in cached plans and saved pipelines: ``"name"``, the
            names of the model and its weights, on any machine with the library; ``"file"``, the
            weights file; ``"content"``, the module that a factory builds.
        libraries: The packages that build the model. A new version of one invalidates cached plans.
        infers_shapes: Whether PyTorch's ``meta`` device can infer the shapes without computing.
        beside_weights: The names of files next to a weights file that describe how to use it.
        contains_weights: Whether the model comes with its weights, so that no others can be given.
        defaults: The options whose defaults are the source's own.
        config_digest: A digest of a configuration that comes with the weights, else empty.
    """

    backends: tuple[str, ...] = ENGINES
    identity: Literal["name", "file", "content"] = "name"
    libraries: tuple[str, ...] = ("torch",)
    infers_shapes: bool = True
    beside_weights: tuple[str, ...] = ()
    contains_weights: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The value of ``FeatureSpec.model``."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {}

    @property
    def config_digest(self) -> str:
        return ""

    def precision(self, option: str) -> str:
        """Resolves a ``precision`` option: ``"auto"`` is whatever each worker computes fast.

        Raises:
            OptionError: The model cannot be computed in this precision.
        """
        if option == "int8":
            raise OptionError(
                "precision='int8' needs a saved model: create one with imagevec.quantize(images, "
                "model=..., output=path), then use model=path"
            )
        return "bfloat16" if option == "auto" else option

    def text_source(self) -> ModelSource:
        """Returns the source of the model's text tower.

        Raises:
            OptionError: The model has none.
        """
        raise OptionError(
            f"model={self.name!r} cannot encode text: use an open_clip model, for example "
            "'open_clip/ViT-B-32', or CLIP or SigLIP of transformers"
        )

    @abstractmethod
    def check(self, layer: str | tuple[str, ...]) -> None:
        """Raises ``OptionError`` if the model, or as far as is known the layer, does not exist."""

    @abstractmethod
    def weights(self, option: str) -> Path | nn.Module | None:
        """Resolves a ``weights`` option to a local file, or to ``None`` for random weights.

        Returns a module if the weights come with a module.

        Raises:
            OptionError: The model has no weights with this name.
            WeightsError: The file does not exist, or the download failed.
        """

    def has_weights(self) -> bool:
        """Returns whether the default weights are on this machine, as far as is known."""
        return False

    def files(self, weights: str) -> list[Path]:
        """Returns the local files that determine the model: a changed file is another model.

        Args:
            weights: The ``weights`` option.
        """
        if not names_file(weights):
            return []
        beside = expanded(weights)
        return [weights_file(weights), *map(beside.with_name, self.beside_weights)]

    def own_weights(self, weights: str, spec: FeatureSpec) -> Path | None:
        """Returns a content-addressed copy of weights that only this machine has, else ``None``.

        Args:
            weights: The ``weights`` option.
            spec: The spec that was planned with it.
        """
        if not self._has_own_weights(weights):
            return None
        stored = cache.find(spec.weights.removeprefix("sha256:"))
        return stored or cache.store(weights_file(weights))

    def _has_own_weights(self, weights: str) -> bool:
        return names_file(weights) or (weights != RANDOM and self.identity != "name")

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        """Returns what a saved pipeline contains: options to replace, and files by their names.

        Args:
            weights: The ``weights`` option.
            own: A function that returns the result of ``own_weights``, and may plan for it.

        Raises:
            OptionError: A pipeline with the model cannot be saved.
        """
        if not self._has_own_weights(weights):
            return {}, {}
        for path in self.files(weights)[1:]:
            if path.is_file():
                raise OptionError(
                    f"a featurizer with weights={str(expanded(weights))!r} cannot be saved, "
                    f"because the model also reads {path.name} next to them: use the name of "
                    "pretrained weights"
                )
        copy = own()
        assert copy is not None
        return {"weights": copy.name}, {copy.name: copy}

    @abstractmethod
    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """Returns the preprocessing that the weights were trained with.

        The source of a text tower returns a ``Tokenization``.

        Args:
            weights_digest: The SHA-256 of the weights file.
            weights: The ``weights`` option.
        """

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        """Returns the preprocessing for another input size than the model's own.

        Args:
            preprocessing: The result of ``preprocessing``.
            input_size: The size: the side of a square, or the height and width.

        Raises:
            OptionError: The model only takes its own size, or is not known to take this one.
        """
        raise OptionError(
            f"input_size={input_size!r} is not valid: {self.name!r} only takes "
            f"{preprocessing.input_size}"
        )

    @abstractmethod
    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        """Builds a model for inputs of this preprocessing, in training or evaluation mode.

        Inputs are images, float32 ``(N, 3, H, W)``, or the tokens of texts, int32 ``(N, L)``.
        """

    def module(
        self, preprocessing: Preprocessing | Tokenization, weights: Path | None
    ) -> nn.Module:
        """Builds the model with the weights of a file, or with random weights for ``None``.

        Raises:
            WeightsError: The weights belong to another model.
        """
        from imagevec.models.state_dict import with_weights

        return with_weights(self, preprocessing, weights)

    def code(self, module: nn.Module) -> str:
        """Returns a digest of the code that is not a library's; empty for models with names.

        Args:
            module: The result of ``module``.
        """
        return ""

    def fitted(
        self,
        tensors: dict[str, torch.Tensor],
        model: nn.Module,
        preprocessing: Preprocessing | Tokenization,
        weights: Path,
    ) -> dict[str, torch.Tensor]:
        """Resamples the weights of a file, such as position embeddings, for another input size.

        Args:
            tensors: The weights, by the names in ``model``.
            model: The result of ``build``.
            preprocessing: The argument of ``build``.
            weights: The file.

        Raises:
            OptionError: The library cannot resample the weights.
        """
        return tensors

    def to_features(
        self,
        module: nn.Module,
        layer: str | tuple[str, ...],
        normalize: bool,
        example: Callable[[int], torch.Tensor],
    ) -> nn.Module:
        """Turns the model into a module that returns feature vectors ``(N, D)``.

        Args:
            module: The result of ``module``, which may be modified.
            layer: The ``layer`` option.
            normalize: The ``normalize`` option.
            example: A function that returns an input with the given number of images or texts.

        Raises:
            OptionError: The layer does not exist, or the model cannot run on the example.
        """
        from imagevec.models.layers import to_feature_model

        def shapes(count: int) -> torch.Tensor:
            return example(count).to("meta")

        return to_feature_model(module, layer, normalize, shapes if self.infers_shapes else example)

    def prepare(self, backend: Backend, model: FeatureModel) -> Prepared:
        """Returns what a backend needs, from the user's cache if it was prepared before.

        Args:
            backend: One of ``backends``.
            model: The model with its options, built on first use.

        Raises:
            ConversionError: The backend cannot run the model.
            OptionError: The options do not fit the model.
            WeightsError: The weights cannot be loaded.
        """
        content = model.content if self.identity == "content" else ""
        key = self._key(backend, model, content)
        record = cache.recall(key)
        if record is None:
            spec, paths = _converted(backend, model)
            names = (*(path.name for path in paths), *spec.preprocessing.files)
            made = json.loads(spec.to_json())
            record = {"spec": made, "weights": model.weights, "files": names}
            cache.remember(key, record)
        spec = FeatureSpec.from_json(json.dumps(record["spec"]))
        files = tuple(name for name in record["files"] if name not in spec.preprocessing.files)
        return Prepared(spec, files, content if backend.BUILDS_MODULE else "")

    def convert(
        self, backend: Backend, model: FeatureModel
    ) -> tuple[FeatureSpec, tuple[Path, ...]]:
        """Returns the spec of the vectors, and the files in the user's cache for the backend.

        The arguments and errors are those of ``prepare``.
        """
        files = backend.prepare(model)
        return model.spec, files

    def _key(self, backend: Backend, model: FeatureModel, content: str) -> str:
        parts: list[Any] = [type(self).__name__, self.name, *model.options]
        parts += [backend.NAME, backend.version(), __version__, *map(_version, self.libraries)]
        if self.identity == "name":  # and nothing has to be built
            files = self.files(model.weights)
            parts += [digest_of(file) if file.is_file() else "" for file in files]
            parts += [] if names_file(model.weights) else [model.weights]
        else:
            parts += [model.weights_name, content, dataclasses.asdict(model.preprocessing)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _converted(backend: Backend, model: FeatureModel) -> tuple[FeatureSpec, tuple[Path, ...]]:
    try:
        return model.source.convert(backend, model)
    except (ImageVecError, MemoryError):
        raise
    except Exception as error:  # converters and torch.jit raise arbitrary exceptions
        raise ConversionError(
            f"{backend.NAME} cannot convert {model.source.name!r}: {error}"
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


REGISTERED: dict[str, ModelSource] = {}
"""The sources added by ``register_model``, by name."""
