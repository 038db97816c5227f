"""The files of a model in a local folder, or in a repository of the Hugging Face hub.

They are named ``local-dir:<folder>`` and ``hf-hub:<owner>/<name>``, with ``@<revision>`` if it is
not the newest, as timm and open_clip name them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagevec.errors import MissingExtraError, OptionError, WeightsError
from imagevec.files import expanded
from imagevec.options import names_file

NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")


@dataclass(frozen=True)
class Repository:
    """The files of a model.

    Attributes:
        library: ``"timm"`` or ``"open_clip"``.
        kind: ``"local-dir"`` or ``"hf-hub"``.
        where: The absolute folder, or the repository with its revision.
    """

    library: str
    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}"

    @property
    def name(self) -> str:
        """The value of ``FeatureSpec.model``, which has no path."""
        if self.kind == "local-dir":
            return f"{self.library}:{Path(self.where).name}"
        return f"{self.library}/{self}"

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        """Returns what ``ModelSource.to_save`` does.

        Raises:
            OptionError: The model is a folder, which another machine does not have.
        """
        if self.kind == "local-dir":
            raise OptionError(
                f"a featurizer with the folder {self.where} as model cannot be saved: use a model "
                "on the hub ('hf-hub:<owner>/<name>'), or save an int8 model of imagevec.quantize"
            )
        copy = own() if names_file(weights) else None
        return ({}, {}) if copy is None else ({"weights": copy.name}, {copy.name: copy})

    def first(self, names: Sequence[str]) -> Path:
        """Returns the first of these files that exists.

        Raises:
            WeightsError: There is none, or the hub cannot be reached.
        """
        listed = " or ".join(names[:2])  # the others are rare
        try:
            found = self.find(names)
        except WeightsError as error:
            raise WeightsError(
                f"{error}. Without a network, download {listed} of {self.where} on "
                "another machine, put it in a folder with the other files of the model, and use "
                f"model='{self.library}/local-dir:<folder>'"
            ) from error
        if found is None:
            raise WeightsError(f"{self.where} does not contain {listed}")
        return found

    def find(self, names: Sequence[str]) -> Path | None:
        """Returns the first of these files that exists, or ``None``.

        Raises:
            WeightsError: The hub cannot be reached.
        """
        if self.kind == "local-dir":
            paths = (Path(self.where) / name for name in names)
            return next((path for path in paths if path.is_file()), None)
        missing: WeightsError | None = None
        for name in names:
            try:
                path = _downloaded(self.library, self.where, name)
            except WeightsError as error:
                missing = missing or error
                continue
            if path is not None:
                return path
        if missing is not None:
            raise missing
        return None

    def json(self, name: str) -> dict[str, Any]:
        """Returns the content of a JSON file. The errors are those of ``first``."""
        return read_json(self.first((name,)))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file that describes a model.

    Raises:
        WeightsError: It is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not valid: it contains no JSON object")
    return content


def find(name: str, prefix: str) -> Repository | None:
    """Returns the files of a name without the prefix of its library, or ``None`` for another name.

    Raises:
        OptionError: The folder does not exist, or the name is not that of a repository.
    """
    library = prefix.rstrip("/")
    kind, _, where = name.partition(":")
    if kind == "local-dir":
        folder = expanded(where).absolute()
        if not where or not folder.is_dir():
            raise OptionError(f"model={prefix + name!r}: no such folder")
        return Repository(library, kind, str(folder))
    if kind == "hf-hub":
        if not is_repository(name):
            raise OptionError(
                f"model={prefix + name!r} is not valid: use '{prefix}hf-hub:<owner>/<name>', with "
                "'@<revision>' if it is not the newest"
            )
        return Repository(library, kind, where)
    return None


def is_repository(name: str) -> bool:
    """Returns whether a name without the prefix of its library is that of a repository."""
    kind, _, where = name.partition(":")
    return kind == "hf-hub" and NAME.fullmatch(where) is not None and ".." not in where


@functools.lru_cache(maxsize=64)
def _downloaded(library: str, where: str, file: str) -> Path | None:
    """Returns a file of a repository in the hub's cache, or ``None`` if it does not exist.

    Raises:
        WeightsError: The hub cannot be reached, or it has no such repository.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        extra = {"timm": "timm", "open_clip": "clip"}[library]
        raise MissingExtraError("huggingface_hub", extra) from error
    repository, _, revision = where.partition("@")
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(where, file, error) from error
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # of the hub and of its HTTP client
        raise _unreachable(where, file, error) from error


def _unreachable(where: str, file: str, error: Exception) -> WeightsError:
    first = str(error).strip().partition("\n")[0][:200]
    return WeightsError(f"cannot fetch {file} of {where} ({type(error).__name__}: {first})")
