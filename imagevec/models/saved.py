"""Saved models: a folder with the engine's files and a ``spec.json`` that names the backend.

``quantize`` writes a saved model and ``model="<path>"`` reads it. The digests in ``spec.json``
detect corruption, not tampering.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from imagevec import cache
from imagevec.errors import OptionError, WeightsError
from imagevec.files import PREFIX as NAME_PREFIX
from imagevec.files import digest_of, expanded
from imagevec.models.source import ModelSource, Prepared
from imagevec.options import ENGINES, RANDOM
from imagevec.spec import FeatureSpec, Preprocessing, Tokenization

if TYPE_CHECKING:
    from torch import nn

    from imagevec.engines import Backend
    from imagevec.models.features import FeatureModel

PREFIX = ""
SPEC_FILE = "spec.json"


def find(model: Any) -> SavedSource | None:
    """Returns the source of the path of a saved model.

    Raises:
        WeightsError: The folder is damaged or was altered.
    """
    if not is_saved_model(model):
        return None
    folder = expanded(model)
    saved = read(folder)
    return SavedSource(folder, saved, (saved.backend,))


def names(part: str = "") -> list[str]:
    """Returns no names: saved models are given by path."""
    return []


class SavedModel(NamedTuple):
    """The contents of a saved model.

    Attributes:
        spec: The features that the model computes.
        backend: The backend that runs the model, one of ``imagevec.options.ENGINES``.
        files: The files that the backend loads, in order.
    """

    spec: FeatureSpec
    backend: str
    files: tuple[Path, ...]


def is_saved_model(model: object) -> bool:
    """Returns whether a ``model`` option is the path of a saved model."""
    return isinstance(model, str | Path) and (expanded(model) / SPEC_FILE).is_file()


def write(folder: Path, spec: FeatureSpec, backend: str, files: Sequence[Path]) -> None:
    """Writes ``spec.json`` to a folder that already contains the files."""
    content = {
        "backend": backend,
        "spec": json.loads(spec.to_json()),
        "fingerprint": spec.fingerprint,
        "files": {path.name: digest_of(path) for path in files},
    }
    (folder / SPEC_FILE).write_text(json.dumps(content, indent=2) + "\n")


def file_names(folder: Path) -> list[str]:
    """Returns the names of the files in ``spec.json``, which may not exist yet.

    Raises:
        WeightsError: A name is a path, which could leave the folder.
    """
    names = list(json.loads((folder / SPEC_FILE).read_text())["files"])
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise WeightsError(f"{folder / SPEC_FILE} is not valid: {name!r} is not a file name")
    return names


def read(folder: Path) -> SavedModel:
    """Reads and verifies a saved model.

    Raises:
        WeightsError: The folder is damaged or was altered.
    """
    try:
        content = json.loads((folder / SPEC_FILE).read_text())
        spec = FeatureSpec.from_json(json.dumps(content["spec"]))
        backend: str = content["backend"]
        expected: dict[str, str] = dict(content["files"])
        files = tuple(folder / name for name in file_names(folder))
        found = {path.name: digest_of(path) for path in files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} is not a saved model: {error!r}") from error
    if backend not in ENGINES:
        raise WeightsError(f"{folder} was saved by another version: it runs with {backend!r}")
    if spec.fingerprint != content.get("fingerprint"):
        raise WeightsError(f"{folder / SPEC_FILE} was altered: its fingerprint does not match")
    for path in files:
        if found[path.name] != expected[path.name]:
            raise WeightsError(
                f"{path} was altered: its SHA-256 is {found[path.name]}, not {expected[path.name]}"
            )
    return SavedModel(spec, backend, files)


def copy_to_cache(name: str, origin: str, copy: Callable[[str, Path], None]) -> Path:
    """Copies a saved model to the user's cache, and verifies it.

    Args:
        name: The digest of its ``spec.json``, as in ``SavedSource.to_save``.
        origin: Where it is, for messages.
        copy: A function that copies the file with this name to a local path.

    Raises:
        WeightsError: A file is missing or was altered.
    """
    cached = cache.folder("saved_models") / name
    cache.use(cached)
    with cache.temporary_folder() as temporary:
        folder = temporary / name
        copy(SPEC_FILE, folder / SPEC_FILE)
        found, expected = digest_of(folder / SPEC_FILE), name.removeprefix(NAME_PREFIX)
        if found != expected:
            raise WeightsError(
                f"{origin}/{SPEC_FILE} was altered: its SHA-256 is {found}, not {expected}"
            )
        for file in file_names(folder):
            copy(file, folder / file)
        read(folder)
        try:
            read(cached)
        except WeightsError:  # missing or damaged
            shutil.rmtree(cached, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first
                folder.rename(cached)
    return cached


@dataclass(frozen=True)
class SavedSource(ModelSource):
    """A saved model. Its options are fixed, except those of ``ExecutionOptions`` and ``decode``."""

    folder: Path
    saved: SavedModel
    backends: tuple[str, ...]

    identity = "file"
    contains_weights = True

    @property
    def name(self) -> str:
        return self.saved.spec.model

    @property
    def defaults(self) -> dict[str, Any]:
        spec = self.saved.spec
        return {"layer": spec.layer, "normalize": spec.normalize, "precision": spec.precision}

    def precision(self, option: str) -> str:
        if option != "auto":
            self._check_fixed("precision", option)
        return self.saved.spec.precision

    def _check_fixed(self, option: str, value: Any) -> None:
        expected = getattr(self.saved.spec, option)
        if value != expected:
            raise OptionError(f"{option}={value!r} is not valid: {self.folder} uses {expected!r}")

    def check(self, layer: str | tuple[str, ...]) -> None:
        self._check_fixed("layer", layer)

    def weights(self, option: str) -> Path | nn.Module | None:
        if option != "DEFAULT":
            raise OptionError(f"weights={option!r} is not valid: {self.folder} contains weights")
        return self.folder / SPEC_FILE

    def has_weights(self) -> bool:
        return True

    def own_weights(self, weights: str, spec: FeatureSpec) -> Path | None:
        return None  # they are in the folder

    def files(self, weights: str) -> list[Path]:
        return [self.folder / SPEC_FILE, *self.saved.files]

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        spec_file = cache.store(self.folder / SPEC_FILE)
        name = spec_file.stem
        files = {f"{name}/{path.name}": path for path in self.saved.files}
        return {"model": name}, {**files, f"{name}/{SPEC_FILE}": spec_file}

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        return cast(Preprocessing, self.saved.spec.preprocessing)  # quantize takes images only

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        raise OptionError(f"{self.folder} is a saved model: {self.saved.backend} runs its files")

    def prepare(self, backend: Backend, model: FeatureModel) -> Prepared:
        """Stores the files in the user's cache, from which they are shipped to workers."""
        self.check(model.layer)
        self._check_fixed("normalize", model.normalize)
        self.weights(model.weights)
        spec = dataclasses.replace(self.saved.spec, preprocessing=model.preprocessing)
        return Prepared(spec, tuple(cache.store(x).name for x in self.saved.files))
