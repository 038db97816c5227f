"""Saved models: a folder with the engine's files and a ``spec.json`` that names the backend.

``quantize`` writes a saved model and ``model="<path>"`` reads it. The digests in ``spec.json``
detect corruption, not tampering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from imagevec import cache
from imagevec.errors import WeightsError
from imagevec.files import digest_of, expanded
from imagevec.options import ENGINES
from imagevec.spec import FeatureSpec

SPEC_FILE = "spec.json"


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


def store(saved: SavedModel) -> tuple[Path, ...]:
    """Stores the files in the user's cache, from which they are shipped to workers."""
    return tuple(cache.store(path) for path in saved.files)
