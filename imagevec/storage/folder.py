"""A folder in any store, whose files are read and written by name, with retries."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from imagevec.errors import ReadError, WriteError
from imagevec.options import DEFAULTS
from imagevec.storage.location import Location
from imagevec.storage.opened import open_file
from imagevec.storage.retry import retried
from imagevec.storage.stores import TEMPORARY, Store, store_of

_CHUNK_BYTES = 1 << 20

T = TypeVar("T")


class Folder:
    """A local folder, or one in a store. It can be pickled, and need not exist.

    Its methods take paths relative to the folder, as plain text without percent-encoding.

    Args:
        path: A path or URI.
        timeout_seconds: How long each method retries.

    Raises:
        ReadError, WriteError: The store does not answer within the timeout, or only a person can
            help: permission is denied, the disk is full, a folder is a file, or the settings are
            wrong.
        UnsupportedURIError: The store cannot do this, or the URI is malformed.
    """

    def __init__(
        self, path: str | Path, timeout_seconds: float = DEFAULTS["read_timeout_seconds"]
    ) -> None:
        location = Location.of(path)
        root = "/" if location.is_local else ""
        self.location = location.sibling(location.path.rstrip("/") or root)
        self._timeout_seconds = timeout_seconds

    @property
    def path(self) -> str:
        """The absolute path or URI, without a slash at its end."""
        return str(self.location)

    def sub(self, name: str) -> Folder:
        below = copy.copy(self)
        below.location = self._at(name)
        return below

    def names(self, folder: str = "", only_files: bool = False) -> list[str]:
        """Returns the sorted names in a folder, which are none if it does not exist."""
        location = self._at(folder)

        def attempt(store: Store) -> list[str]:
            _check_exact(location)
            entries = store.entries(location)
            names = {entry.name for entry in entries if entry.kind == "file" or not only_files}
            return sorted(name for name in names if not name.startswith(TEMPORARY))

        try:
            return self._retried(location, attempt, any_size=True)
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes | None:
        """Returns the content of a file, or ``None`` if it does not exist."""
        location = self._at(path)
        try:
            return self._retried(location, lambda store: _content(store, location))
        except FileNotFoundError:
            return None

    def open(self, path: str) -> Any:
        """Opens a file for reading: see ``open_file``."""
        location = self._at(path)
        if not location.is_local:
            return open_file(location, self._timeout_seconds)

        def attempt(store: Store) -> Any:
            _check_exact(location)
            return store.open(location)

        return self._retried(location, attempt)

    def write(self, path: str, data: bytes) -> None:
        """Writes a file, or replaces it, atomically."""
        location = self._at(path)
        self._retried(
            location, lambda store: store.write(location, data), writes=True, any_size=True
        )

    def create(self, path: str, data: bytes) -> bool:
        """Writes a new file, and returns whether it did: of several callers, one succeeds.

        Args:
            data: The content, which must differ between callers: a caller that gets no answer
                recognises its own file by it.
        """
        location = self._at(path)
        tries = 0

        def attempt(store: Store) -> bool:
            nonlocal tries
            tries += 1
            try:
                store.create(location, data)
            except FileExistsError:
                return tries > 1 and _content(store, location) == data
            return True

        return self._retried(location, attempt, writes=True)

    def upload(self, file: Path, path: str) -> None:
        """Writes a file, or replaces it, atomically, from a local file of any size."""
        location = self._at(path)
        self._retried(
            location, lambda store: store.upload(location, file), writes=True, any_size=True
        )

    def download(self, path: str, file: Path) -> None:
        """Writes a local file, or replaces it, atomically, from a file of any size.

        Raises:
            FileNotFoundError: The file to download does not exist.
        """
        location = self._at(path)

        def attempt(store: Store) -> None:
            _check_exact(location)
            store.download(location, file)

        self._retried(location, attempt, any_size=True)

    def move(self, source: str, target: str) -> bool:
        """Renames a file, and replaces the target. Returns whether the source existed."""
        old, new = self._at(source), self._at(target)
        tries = 0

        def attempt(store: Store) -> bool:
            nonlocal tries
            tries += 1
            try:
                store.move(old, new)
            except FileNotFoundError:  # perhaps because of an earlier try without an answer
                return tries > 1 and _exists(store, new)
            return True

        return self._retried(old, attempt, writes=True)

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with its contents, if it exists; this folder for ``""``."""
        location = self._at(path)
        self._retried(location, lambda store: store.delete(location), writes=True, any_size=True)

    def delete_empty(self, path: str) -> None:
        """Deletes a folder if it exists and is empty. Object stores have no empty folders."""
        location = self._at(path)
        self._retried(location, lambda store: store.delete_empty(location), writes=True)

    def _retried(
        self,
        location: Location,
        action: Callable[[Store], T],
        *,
        writes: bool = False,
        any_size: bool = False,
    ) -> T:
        try:
            return retried(
                location,
                lambda: action(store_of(location)),
                self._timeout_seconds,
                writes=writes,
                any_size=any_size,
            )
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not writes:
                raise
            kind, done = (WriteError, "written") if writes else (ReadError, "read")
            raise kind(f"{location} cannot be {done}: {error}") from error

    def _at(self, path: str) -> Location:
        plain = path.strip("/")
        if not plain:
            return self.location
        if self.location.store_scheme in _QUOTED:
            plain = plain.replace("%", "%25").replace("?", "%3F")
        return self.location.sibling(f"{self.location.path.rstrip('/')}/{plain}")


# The schemes whose stores unquote the paths of their URIs.
_QUOTED = ("s3", "gs", "abfs", "abfss", "az", "hdfs")


def _content(store: Store, location: Location) -> bytes:
    _check_exact(location)
    parts = []
    with store.stream(location) as stream:
        while part := stream.read(_CHUNK_BYTES):
            parts.append(part)
    return b"".join(parts)


def _exists(store: Store, location: Location) -> bool:
    try:
        _check_exact(location)
        store.entry(location)
    except FileNotFoundError:
        return False
    return True


def _check_exact(location: Location) -> None:
    """Raises ``FileNotFoundError`` for a local path that does not exist as it is written.

    The local store would otherwise read its unquoted form.
    """
    if location.is_local:
        os.lstat(location.path)
