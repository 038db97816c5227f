"""Files that are named by their content, so that what a worker finds is what the driver meant."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from imagevec.errors import WeightsError

_PREFIX = "imagevec-"


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hex digits; computed once for each version of the file."""
    stat = path.stat()
    return _digest_of_version(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of_version(path: Path, size_bytes: int, modified_ns: int) -> str:
    del size_bytes, modified_ns  # they tell versions of the file apart
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def content_addressed(path: Path) -> Path:
    """A copy of a file in the user's cache, with the digest as its name."""
    digest = digest_of(path)
    target = cache_dir("files") / f"{_PREFIX}{digest}{path.suffix}"
    if not target.exists() or digest_of(target) != digest:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            copy = Path(folder) / target.name
            shutil.copyfile(path, copy)  # not a link: the original may be written over
            copy.replace(target)  # at once: no process ever sees half of a file
    return target


def cached(digest: str) -> Path | None:
    """The file of the user's cache with this SHA-256, if there is one."""
    return next(iter(cache_dir("files").glob(f"{_PREFIX}{digest}.*")), None)


def verified(path: Path) -> Path:
    """The path of a content-addressed file, once its content is found to be what its name says.

    Raises:
        WeightsError: The file is missing or was altered.
    """
    expected = path.stem.removeprefix(_PREFIX)
    try:
        found = digest_of(path)
    except OSError as error:
        raise WeightsError(f"the weights file {path.name} cannot be read: {error}") from error
    if found != expected:
        raise WeightsError(f"{path.name} was altered: its SHA-256 is {found}, not {expected}")
    return path


def cache_dir(kind: str) -> Path:
    """A folder of the user's cache, ``$XDG_CACHE_HOME/imagevec/<kind>``, made where it is not."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser() / "imagevec" / kind
    path.mkdir(parents=True, exist_ok=True)
    return path
