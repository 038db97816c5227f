"""Content-addressed files: workers verify that they have the driver's files."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from imagevec.errors import WeightsError

PREFIX = "imagevec-"


def expanded(path: str | Path) -> Path:
    """Replaces ``~``, as ``Path.expanduser`` does; it remains if the user has no home directory."""
    return Path(os.path.expanduser(path))


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hex digits, computed once per version of the file."""
    stat = path.stat()
    return _digest_of_version(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of_version(path: Path, size_bytes: int, modified_ns: int) -> str:
    del size_bytes, modified_ns  # they only identify the version of the file
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def verified(path: Path) -> Path:
    """Returns the path of a content-addressed file after comparing its content with its name.

    Raises:
        WeightsError: The file is missing or was altered.
    """
    expected = path.stem.removeprefix(PREFIX)
    try:
        found = digest_of(path)
    except OSError as error:
        raise WeightsError(f"the weights file {path.name} cannot be read: {error}") from error
    if found != expected:
        raise WeightsError(f"{path.name} was altered: its SHA-256 is {found}, not {expected}")
    return path
