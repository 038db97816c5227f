"""Finds the source of a ``model`` option.

torchvision's classification models have their torchvision names, timm models are named
``timm/<name>``, open_clip models ``open_clip/<name>``, and ``register_model`` adds custom models.
The weights determine the preprocessing: the preset of torchvision's weights entry, timm's data
config, the configuration of open_clip's tag, or the registered preprocessing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from imagevec.errors import OptionError
from imagevec.files import expanded
from imagevec.models import (
    exported,
    factory,
    hub,
    onnx,
    open_clip,
    saved,
    timm,
    torchvision,
    transformers,
)
from imagevec.models.factory import ModelFactory
from imagevec.models.source import IMAGENET, REGISTERED, ModelSource
from imagevec.spec import Preprocessing

# In the order of the search; torchvision accepts any remaining name.
SOURCES = (factory, saved, exported, onnx, transformers, timm, open_clip, torchvision)


def list_models() -> list[str]:
    """Returns the names that ``model`` accepts, sorted, without those of timm and open_clip."""
    return sorted([*REGISTERED, *torchvision.names()])


def register_model(
    name: str, factory: ModelFactory | str | Path, *, preprocessing: Preprocessing | None = None
) -> None:
    """Registers a model, so that ``model=name`` works in this process and the jobs it starts.

    Args:
        name: A new name.
        factory: A function that returns a new ``nn.Module`` for input float32 ``(N, 3, H, W)``. It
            is pickled with cloudpickle, and called once per plan on the driver and once in each
            worker that runs it with PyTorch; OpenVINO's workers load the converted model. Or the
            path of an ``.onnx`` file: see ``imagevec.models.onnx``. Or the path of a ``.pt2`` file,
            which can run code when it is loaded: see ``imagevec.models.exported``.
        preprocessing: The preprocessing of the images. Default: torchvision's
            ``ImageClassification`` preset, adapted to the input size of a ``.pt2`` file.

    Raises:
        OptionError: The name is taken, the factory is not callable, the file does not exist, or
            ``preprocessing`` has another type.
        SerializationError: The factory captures an object that must not be pickled, for example a
            session.
    """
    if not isinstance(name, str) or not name:
        raise OptionError(f"the model name {name!r} is not valid: use a non-empty string")
    prefixes = tuple(source.PREFIX for source in SOURCES if source.PREFIX)
    if name in list_models() or name.startswith(prefixes):
        raise OptionError(f"the model name {name!r} is taken: choose another")
    if not (preprocessing is None or isinstance(preprocessing, Preprocessing)):
        raise OptionError(
            f"preprocessing={preprocessing!r} is not valid: use an imagevec.Preprocessing"
        )
    REGISTERED[name] = _registered(name, factory, preprocessing)


def _registered(
    name: str, factory_or_file: Any, preprocessing: Preprocessing | None
) -> ModelSource:
    file = exported.find(factory_or_file) or onnx.find(factory_or_file)
    if file is not None:
        return dataclasses.replace(file, preset=preprocessing, registered_name=name)
    if not callable(factory_or_file):
        raise OptionError(
            f"factory={factory_or_file!r} is not valid: use a function without arguments"
        )
    factory.check(factory_or_file)
    return factory.FactorySource(factory_or_file, preprocessing or IMAGENET, name)


def find_source(model: str | Path | ModelFactory) -> ModelSource:
    """Returns the source of a ``model`` option. Its ``check`` tests whether the model exists.

    Raises:
        OptionError: The option is a live module, or a path that does not exist.
        SerializationError: The factory captures an object that must not be pickled, for example a
            session.
    """
    for source in SOURCES:
        found: ModelSource | None = source.find(model)
        if found is not None:
            return found
    path = expanded(str(model))
    if path.exists():
        raise OptionError(
            f"model={str(model)!r} is not a saved model, which has a spec.json, or a folder of "
            "transformers, which has a config.json"
        )
    raise OptionError(f"model={str(model)!r}: no such folder")


def named(model: str, precision: str, origin: str) -> str:
    """Returns the ``model`` option of the features of a table, if it is a name.

    Args:
        model: ``FeatureSpec.model``.
        precision: ``FeatureSpec.precision``.
        origin: The table, for the message.

    Raises:
        OptionError: The option was a path or a factory.
    """
    kind, is_kind, _ = model.partition(":")
    is_factory = is_kind and kind == "factory"
    if is_factory and precision != "int8":
        raise OptionError(
            f"the table was made with a function, {model!r}: only its own images can be queries"
        )
    if precision == "int8" or (is_kind and kind.isidentifier()):
        raise OptionError(
            f"the table was made with {model!r}, a file or folder: give it as --model"
        )
    check_is_name(model, origin)
    return model


def check_is_name(model: str, origin: str) -> None:
    """Checks that a ``model`` option that was read from data is a name, not a path.

    A path from data would let a downloaded table or pipeline choose the file that is loaded, and
    loading a ``.pt2`` file can run code. A name that this process registered is always accepted.

    Args:
        model: The option.
        origin: Where it was read, for the message.

    Raises:
        OptionError: It is, or could be read as, a path, a URI or a factory.
    """
    if model in REGISTERED:
        return
    library = next((x.PREFIX for x in SOURCES if x.PREFIX and model.startswith(x.PREFIX)), "")
    name = model.removeprefix(library)
    is_path = name.startswith((".", "~")) or any(c in name for c in "/\\:")
    if library in (timm.PREFIX, open_clip.PREFIX) and hub.is_repository(name):
        is_path = False
    if library == transformers.PREFIX:
        is_path = False  # is_folder checks it
    is_path |= name.endswith((exported.SUFFIX, onnx.SUFFIX)) or saved.is_saved_model(model)
    is_path |= transformers.is_folder(model)
    if not name or is_path or onnx.find(model):
        raise OptionError(
            f"the model {model!r} of {origin} is not a name: models are only loaded from paths "
            "that you pass yourself, as model"
        )
