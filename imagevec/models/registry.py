"""A ``model`` option to its source.

torchvision's classification models are known by their torchvision names, timm's as
``timm/<name>``, open_clip's as ``open_clip/<name>``, your own through ``register_model``.
Preprocessing travels with the weights: torchvision's preset of the weights entry, timm's data
config, open_clip's of the tag, or what was registered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from imagevec.errors import OptionError
from imagevec.models import exported, factory, open_clip, timm, torchvision
from imagevec.models.entry import IMAGENET, REGISTERED, ModelSource
from imagevec.models.factory import ModelFactory
from imagevec.spec import Preprocessing

# In the order in which they are asked; torchvision takes whatever name is left.
SOURCES = (factory, exported, timm, open_clip, torchvision)


def list_models() -> list[str]:
    """The names that ``model`` accepts, sorted; those of timm and open_clip are accepted too."""
    return sorted([*REGISTERED, *torchvision.names()])


def register_model(
    name: str, factory: ModelFactory | str | Path, *, preprocessing: Preprocessing | None = None
) -> None:
    """Makes ``model=name`` mean ``factory``, in this process and in the jobs that it starts.

    Args:
        name: A new name.
        factory: Returns a new ``nn.Module`` that takes float32 ``(N, 3, S, S)``. It is pickled (by
            cloudpickle) and called once on the driver for each plan, and once in each worker that
            runs it with PyTorch; OpenVINO's workers have the converted model. Or the path of a
            ``.pt2`` file, whose loading can run code: see ``imagevec.models.exported``.
        preprocessing: What happens to the pixels before the model; by default that of
            torchvision's ``ImageClassification`` preset, for a ``.pt2`` file in its input size.

    Raises:
        OptionError: The name is taken, the factory is not callable, there is no such file, or
            ``preprocessing`` is of another type.
        SerializationError: The factory captures what must not be pickled, a session for example.
    """
    if not isinstance(name, str) or not name:
        raise OptionError(f"the model name {name!r} is not valid: give a string")
    prefixes = tuple(source.PREFIX for source in SOURCES if source.PREFIX)
    if name in list_models() or name.startswith(prefixes):
        raise OptionError(f"the model name {name!r} is taken: choose another")
    if not (preprocessing is None or isinstance(preprocessing, Preprocessing)):
        raise OptionError(
            f"preprocessing={preprocessing!r} is not valid: give an imagevec.Preprocessing"
        )
    REGISTERED[name] = _registered(name, factory, preprocessing)


def _registered(
    name: str, factory_or_file: Any, preprocessing: Preprocessing | None
) -> ModelSource:
    file = exported.find(factory_or_file)
    if file is not None:
        return exported.ExportedSource(file.path, preprocessing, name)
    if not callable(factory_or_file):
        raise OptionError(
            f"factory={factory_or_file!r} is not valid: give a function without arguments"
        )
    factory.check(factory_or_file)
    return factory.FactorySource(factory_or_file, preprocessing or IMAGENET, name)


def find_source(model: str | Path | ModelFactory) -> ModelSource:
    """The source of a ``model`` option; whether it has such a model is for its ``check`` to say.

    Raises:
        OptionError: The option is a live module, or a path where nothing is.
        SerializationError: The factory captures what must not be pickled, a session for example.
    """
    for source in SOURCES:
        found: ModelSource | None = source.find(model)
        if found is not None:
            return found
    path = Path(str(model)).expanduser()
    if path.exists():
        raise OptionError(f"model={str(model)!r} is not a saved model: it has no spec.json")
    raise OptionError(f"model={str(model)!r}: there is no such folder")


def find_text_source(model: Any) -> ModelSource:
    """The source of the text tower that belongs to a ``model`` option.

    Raises:
        OptionError: It has none.
    """
    source = open_clip.find(model)
    if source is None:
        raise OptionError(
            f"model={model!r} cannot encode text: use a model of open_clip, "
            "'open_clip/ViT-B-32' for example"
        )
    return cast(ModelSource, source.text_source())
