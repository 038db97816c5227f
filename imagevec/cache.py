"""The user's cache: files that are named by their content, and what plans were made before.

It is ``$XDG_CACHE_HOME/imagevec``, ``~/.cache/imagevec`` by default. It holds at most
``$IMAGEVEC_CACHE_GB`` gigabytes, 5 by default: of more, what was used longest ago is deleted, but
for what this process uses. ``imagevec cache`` lists and empties it.
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
_STALE_SECONDS = 24 * 3600  # of a temporary folder whose process has died

_in_use: set[Path] = set()


class Entry(NamedTuple):
    """A file or folder of the cache.

    Attributes:
        path: Where it is.
        bytes: Its size.
        used: When it was used last, in seconds since 1970.
    """

    path: Path
    bytes: int
    used: float


def folder(kind: str) -> Path:
    """The folder for ``"files"``, ``"plans"`` or ``"saved_models"``, made where it is not."""
    path = root() / kind
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder on the cache's file system, from which files can be renamed into it."""
    with tempfile.TemporaryDirectory(dir=folder("tmp")) as path:
        yield Path(path)


def stored(name: str) -> Path:
    """Where the file with this content-addressed name is, or would be."""
    return folder("files") / name


def store(path: Path, *, move: bool = False) -> Path:
    """The file's place in the cache, where its digest is its name.

    Args:
        path: Any file.
        move: It is of no use elsewhere, and moved instead of copied.
    """
    digest = digest_of(path)
    target = stored(f"{PREFIX}{digest}{path.suffix}")
    if not target.exists() or digest_of(target) != digest:
        with temporary_folder() as temporary:
            copy = temporary / target.name
            # Not a link: the original may be written over.
            (shutil.move if move else shutil.copyfile)(path, copy)
            copy.replace(target)  # at once: no process ever sees half of a file
    use(target)
    trim()
    return target


def find(digest: str) -> Path | None:
    """The file with this SHA-256, if there is one."""
    return next(iter(folder("files").glob(f"{PREFIX}{digest}.*")), None)


def use(path: Path) -> None:
    """Notes that this process uses a file or folder of the cache."""
    _in_use.add(path)
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def remember(key: str, record: dict[str, Any]) -> None:
    """Keeps a record, whose ``"files"`` are names of stored files, for ``recall``."""
    with temporary_folder() as temporary:
        path = temporary / "record.json"
        path.write_text(json.dumps(record, indent=1))
        path.replace(_record(key))


def recall(key: str) -> dict[str, Any] | None:
    """What was kept, if all of its files are here and unaltered."""
    try:
        record: dict[str, Any] = json.loads(_record(key).read_text())
        for name in record["files"]:
            use(verified(stored(name)))
    except (OSError, ValueError, KeyError, TypeError, WeightsError):
        return None
    use(_record(key))
    return record


def entries() -> list[Entry]:
    """What the cache holds, the least recently used first."""
    found = []
    for kind in ("files", "plans", "saved_models"):
        for path in folder(kind).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process deleted it
                found.append(_entry(path))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def models() -> dict[str, str]:
    """The models of files and records, by their names, as far as remembered plans say."""
    found: dict[str, str] = {}
    for path in folder("plans").iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError):
            stat = path.stat()
            record = json.loads(path.read_text())
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # to look is not to use
            found |= dict.fromkeys([path.name, *record["files"]], str(record["spec"]["model"]))
    return found


def limit_bytes() -> int:
    """What the cache may hold.

    Raises:
        OptionError: ``$IMAGEVEC_CACHE_GB`` is not a number.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_GB)
    try:
        return int(float(text) * 1e9)
    except ValueError as error:
        raise OptionError(f"{LIMIT_VARIABLE}={text!r} is not a number of gigabytes") from error


def trim() -> None:
    """Deletes what was used longest ago, down to the limit."""
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
    """Deletes all of it. A job under way that has not fetched its files yet fails."""
    shutil.rmtree(root(), ignore_errors=True)
    _in_use.clear()


def root() -> Path:
    """Where it is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imagevec"


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
