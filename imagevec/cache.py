"""The user's cache of content-addressed files and of earlier plans.

The cache is in ``$XDG_CACHE_HOME/imagevec``, by default ``~/.cache/imagevec``. It is limited to
``$IMAGEVEC_CACHE_GB`` gigabytes, by default 5. Above the limit, the least recently used entries are
deleted, except those that this process uses. ``imagevec cache`` lists and clears the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from imagevec.errors import OptionError, WeightsError
from imagevec.files import PREFIX, digest_of, verified

LIMIT_VARIABLE = "IMAGEVEC_CACHE_GB"
_DEFAULT_GB = 5.0
_STALE_SECONDS = 24 * 3600  # age at which a temporary folder is considered abandoned

_in_use: set[Path] = set()


class Entry(NamedTuple):
    """A file or folder in the cache.

    Attributes:
        path: The path of the entry.
        bytes: The size of the entry.
        used: The time of the last use, in seconds since 1970.
    """

    path: Path
    bytes: int
    used: float


def folder(kind: str) -> Path:
    """Returns the folder of a kind, ``"files"`` for example, and creates it if needed."""
    path = root() / kind
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a folder on the cache's file system, so that files can be renamed into the cache."""
    with tempfile.TemporaryDirectory(dir=folder("tmp")) as path:
        yield Path(path)


def stored(name: str) -> Path:
    """Returns the path of the file with a content-addressed name, which may not exist."""
    return folder("files") / name


def store(path: Path, *, move: bool = False) -> Path:
    """Stores a file in the cache under its digest, and returns the path there.

    Args:
        path: The file.
        move: Whether to move the file instead of copying it.
    """
    digest = digest_of(path)
    target = stored(f"{PREFIX}{digest}{path.suffix}")
    if not target.exists() or digest_of(target) != digest:
        with temporary_folder() as temporary:
            copy = temporary / target.name
            # Not a link: the original may be overwritten.
            (shutil.move if move else shutil.copyfile)(path, copy)
            copy.replace(target)  # atomic: no process sees a partial file
    use(target)
    trim()
    return target


def find(digest: str) -> Path | None:
    """Returns the file with this SHA-256, or ``None``."""
    return next(iter(folder("files").glob(f"{PREFIX}{digest}.*")), None)


def use(path: Path) -> None:
    """Marks a file or folder of the cache as used by this process."""
    _in_use.add(path)
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def remember(key: str, record: dict[str, Any]) -> None:
    """Saves a record for ``recall``. Its ``"files"`` are the names of stored files."""
    with temporary_folder() as temporary:
        path = temporary / "record.json"
        path.write_text(json.dumps(record, indent=1))
        path.replace(_record(key))


def recall(key: str) -> dict[str, Any] | None:
    """Returns a saved record if all its files exist and are unaltered, else ``None``."""
    try:
        record: dict[str, Any] = json.loads(_record(key).read_text())
        for name in record["files"]:
            use(verified(stored(name)))
    except (OSError, ValueError, KeyError, TypeError, WeightsError):
        return None
    use(_record(key))
    return record


def entries() -> list[Entry]:
    """Returns the entries of the cache, least recently used first."""
    found = []
    for kind in ("files", "plans", "saved_models"):
        for path in folder(kind).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process deleted it
                found.append(_entry(path))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def models() -> dict[str, str]:
    """Returns the model of each file and record named in a cached plan, by the entry's name."""
    found: dict[str, str] = {}
    for path, record in _records():
        found |= dict.fromkeys([path.name, *record["files"]], str(record["spec"]["model"]))
    return found


def weights_option(model: str, weights: str) -> str | None:
    """Returns the ``weights`` option, such as a tag, of the last new plan with these weights.

    Args:
        model: The name of the model, as in ``FeatureSpec``.
        weights: The name of the weights there, such as ``"sha256:..."``.

    Returns:
        The option, or ``None`` if no such plan is in the cache.
    """
    for _, record in _records():
        spec = record["spec"]
        if (spec["model"], spec.get("weights")) == (model, weights) and "weights" in record:
            return str(record["weights"])
    return None


def limit_bytes() -> int:
    """Returns the size limit of the cache.

    Raises:
        OptionError: ``$IMAGEVEC_CACHE_GB`` is not a number.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_GB)
    try:
        return int(float(text) * 1e9)
    except ValueError as error:
        raise OptionError(f"{LIMIT_VARIABLE}={text!r} is not a number of gigabytes") from error


def trim() -> None:
    """Deletes the least recently used entries until the cache is within its limit."""
    found = entries()
    excess = sum(entry.bytes for entry in found) - limit_bytes()
    for entry in found:
        if excess <= 0:
            break
        if entry.path not in _in_use:
            _delete(entry.path)
            excess -= entry.bytes
    for path in folder("tmp").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                _delete(path)


def clear() -> None:
    """Deletes the whole cache. A running job that has not fetched its files yet fails."""
    shutil.rmtree(root(), ignore_errors=True)
    _in_use.clear()


def root() -> Path:
    """Returns the folder of the cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imagevec"


def _records() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the readable records, newest first, without counting as their use."""
    found = []
    for path in folder("plans").iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stat = path.stat()
            record = json.loads(path.read_text())
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            _ = record["files"], record["spec"]["model"]
            found.append((stat.st_mtime_ns, path, record))
    for _, path, record in sorted(found, key=lambda entry: entry[:2], reverse=True):
        yield path, record


def _record(key: str) -> Path:
    return folder("plans") / f"{key}.json"


def _entry(path: Path) -> Entry:
    stat = path.stat()
    size = stat.st_size
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Entry(path, size, stat.st_atime)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
