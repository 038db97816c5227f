"""The user's cache of content-addressed files and of earlier plans.

The cache is in ``$XDG_CACHE_HOME/imagevec``, by default ``~/.cache/imagevec``, or in a private
folder under the temporary directory if the home directory does not exist or is read-only. It is
limited to ``$IMAGEVEC_CACHE_GB`` gigabytes, by default 5. Above the limit, the least recently used
entries are deleted, except those that a running process uses: Spark serves them to its executors.
``imagevec cache`` lists and clears the cache.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from imagevec.errors import ImageVecError, OptionError, WeightsError
from imagevec.files import PREFIX, digest_of, expanded, verified

try:
    import fcntl
except ImportError:  # Windows: other processes do not know what this one uses
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "IMAGEVEC_CACHE_GB"
CURE = "set XDG_CACHE_HOME to a folder that this process can write to"
_DEFAULT_GB = 5.0
_STALE_SECONDS = 24 * 3600  # age at which a temporary folder is considered abandoned
_LOCK = "lock"

_in_use: set[Path] = set()
_notes: tuple[int, Path] | None = None  # the file that tells other processes what is in use


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
    reason = _why_not_writable(path)
    if reason is not None:
        raise ImageVecError(f"the cache cannot be used ({reason}): {CURE}")
    return path


@contextmanager
def temporary_folder(needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a folder on the cache's file system, so that files can be renamed into the cache.

    Args:
        needed_bytes: The size of the files that will be written there, if known.

    Raises:
        ImageVecError: The file system is full.
    """
    parent = folder("tmp")
    try:
        with tempfile.TemporaryDirectory(dir=parent) as path:
            yield Path(path)
    except Exception as error:  # PyTorch, safetensors and OpenVINO raise their own
        free_bytes = shutil.disk_usage(parent).free
        said = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
        if free_bytes >= needed_bytes and not any(text in str(error) for text in said):
            raise
        needed = f"{needed_bytes / 1e6:.1f} MB are needed, " if needed_bytes else ""
        raise ImageVecError(
            f"{root()} is full ({needed}{free_bytes / 1e6:.1f} MB are free): delete files, "
            "or set XDG_CACHE_HOME to a folder on another disk"
        ) from error


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
    use(target)
    if not target.exists() or digest_of(target) != digest:
        with temporary_folder(path.stat().st_size) as temporary:
            copy = temporary / target.name
            # Not a link: the original may be overwritten.
            (shutil.move if move else shutil.copyfile)(path, copy)
            copy.replace(target)  # atomic: no process sees a partial file
    trim()
    return target


def find(digest: str) -> Path | None:
    """Returns the file with this SHA-256, or ``None``."""
    return next(iter(folder("files").glob(f"{PREFIX}{digest}.*")), None)


def use(path: Path) -> None:
    """Marks a file or folder of the cache as used by this process until it exits.

    Afterwards no process deletes it. One may have done so before: check that it exists after this.
    """
    if path not in _in_use or not _is_noted():
        with _locked():
            _in_use.add(path)
            _note(path)
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def remember(key: str, record: dict[str, Any]) -> None:
    """Saves a record for ``recall``. Its ``"files"`` are the names of stored files."""
    text = json.dumps(record, indent=1)
    with temporary_folder(len(text)) as temporary:
        path = temporary / "record.json"
        path.write_text(text)
        path.replace(_record(key))


def recall(key: str) -> dict[str, Any] | None:
    """Returns a saved record if all its files exist and are unaltered, else ``None``."""
    try:
        record: dict[str, Any] = json.loads(_record(key).read_text())
        for name in record["files"]:
            use(stored(name))
            verified(stored(name))
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
    with _locked():
        found = entries()
        excess = sum(entry.bytes for entry in found) - limit_bytes()
        kept = _in_use | _used_by_processes() if excess > 0 else set()
        for entry in found:
            if excess <= 0:
                break
            if entry.path not in kept:
                _delete(entry.path)
                excess -= entry.bytes
    for path in folder("tmp").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                _delete(path)


def clear() -> None:
    """Deletes the whole cache. A running job that has not fetched its files yet fails."""
    with _locked():
        for path in root().iterdir():
            if path.name != _LOCK:
                _delete(path)
        _in_use.clear()


def root() -> Path:
    """Returns the folder of the cache, and creates it if needed.

    Raises:
        ImageVecError: This process cannot write to it.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    path = expanded(chosen or "~/.cache") / "imagevec"
    reason = _why_not_writable(path)
    if reason is None:
        return path
    if chosen:
        raise ImageVecError(f"XDG_CACHE_HOME={chosen!r} is not valid ({reason}): {CURE}")
    private = _private_folder()
    _warn_once(path, reason, private)
    return private


def _why_not_writable(path: Path) -> str | None:
    if path.parts[0].startswith("~"):
        return "there is no home directory"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    effective = os.access in os.supports_effective_ids
    may_write = os.access(path, os.W_OK | os.X_OK, effective_ids=effective)
    return None if may_write else f"{path} is read-only"


def _private_folder() -> Path:
    """Returns a folder under the temporary directory that no other user can write to.

    Raises:
        ImageVecError: Somebody else created it.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows: its folder is the user's own
    path = Path(tempfile.gettempdir()) / f"imagevec-{user}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o077:
        raise ImageVecError(f"{path} is not a private folder of user {user}: delete it, or {CURE}")
    return path


@functools.cache
def _warn_once(path: Path, reason: str, private: Path) -> None:
    logger.warning("%s cannot be used (%s): using %s, or %s", path, reason, private, CURE)


@contextmanager
def _locked() -> Iterator[None]:
    """Excludes other threads and processes that note or delete entries."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                file = stack.enter_context((root() / _LOCK).open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_noted() -> bool:
    """Returns whether this process's file of uses exists: another one may have cleared the cache"""
    if _notes is None:
        return False
    descriptor, path = _notes
    try:
        return path.parent == folder("uses") and os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _note(path: Path) -> None:
    """Tells other processes that this one uses an entry.

    The file is locked until the process exits, however it exits, in this container or another.
    """
    global _notes
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # a full disk, or a file system without locks
        new = [path]
        if _notes is None or not _is_noted():
            if _notes is not None:
                os.close(_notes[0])
            notes = folder("uses") / uuid.uuid4().hex
            _notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), notes
            fcntl.flock(_notes[0], fcntl.LOCK_EX)
            new = list(_in_use)
        os.write(_notes[0], "".join(f"{used}\n" for used in new).encode())


def _used_by_processes() -> set[Path]:
    """Returns what running processes use, and forgets those that have exited."""
    used: set[Path] = set()
    for path in folder("uses").iterdir() if fcntl is not None else ():
        with contextlib.suppress(OSError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its process is running
                used.update(map(Path, file.read().splitlines()))
            else:
                path.unlink()
    return used


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
