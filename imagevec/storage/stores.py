"""File stores: one client for each place, which lives as long as the process.

Local files are read directly. ``s3``, ``gs`` and Azure use obstore, ``http`` and ``https`` urllib3,
``hdfs`` Arrow's client, and all other schemes fsspec, if it supports them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, cast

from imagevec.storage.location import Location

CONNECT_SECONDS = 10
REQUEST_SECONDS = 60  # without any answer
_MAX_STORES = 64  # clients of a process, however many hosts and settings its paths name

_MODULES = {
    "file": "local",
    "hdfs": "hdfs",
    **dict.fromkeys(("http", "https"), "web"),
    **dict.fromkeys(("s3", "gs", "abfs", "abfss", "az"), "objects"),
}


class SettingsError(Exception):
    """A store cannot be used as it is set up: credentials, an endpoint, a bucket."""


class Entry(NamedTuple):
    """An entry of a folder.

    Attributes:
        path: The absolute path or URI, which can be read, or listed if it is a folder.
        name: The last part of the path.
        kind: ``"other"`` is a pipe, socket or device; ``"dangling"`` is a link without a target.
        length: The length of a file, in bytes.
        modified: The modification time of a file, in microseconds since 1970 UTC, if the store
            provides it.
    """

    path: str
    name: str
    kind: Literal["file", "folder", "other", "dangling"]
    length: int = 0
    modified: int | None = None


class Stream(NamedTuple):
    """A file that is being read from start to end.

    Attributes:
        read: Returns at most so many bytes, at least one before the end.
        length: The length of the file in bytes, if the store reports it.
    """

    read: Callable[[int], bytes]
    length: int | None


_BUFFER_BYTES = 1 << 20  # also what is read over after a jump, rather than requested again


def buffered(open_at: Callable[[int], AbstractContextManager[Stream]]) -> io.BufferedReader:
    """Returns a seekable file object that reads streams which start anywhere."""
    return io.BufferedReader(_StreamedFile(open_at), _BUFFER_BYTES)


class _StreamedFile(io.RawIOBase):
    """A file that is read forwards, and requested again after a jump.

    Exceptions of a store's library become ``ConnectionError``.
    """

    def __init__(self, open_at: Callable[[int], AbstractContextManager[Stream]]) -> None:
        self._open_at = open_at
        self._position = 0
        self._opened = ExitStack()
        self._stream: Stream | None = self._opened.enter_context(open_at(0))
        self._length = self._stream.length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._length is not None and self._position >= self._length:
            return 0
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = self._opened.enter_context(self._open_at(self._position))
            data = self._stream.read(size)
        except OSError:
            raise
        except Exception as error:  # each library has its own
            raise ConnectionError(str(error) or type(error).__name__) from error
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence, self._length)
        if base is None:
            raise io.UnsupportedOperation("the store does not report the length of this file")
        target = base + offset
        if 0 < target - self._position <= _BUFFER_BYTES and self._stream is not None:
            while self._position < target and self._read(target - self._position):
                pass
        elif target != self._position:
            self._end()
        self._position = target
        return target

    def close(self) -> None:
        self._end()
        super().close()

    def _end(self) -> None:
        self._stream = None
        self._opened.close()


TEMPORARY = "_writing-"
"""How the name of a file begins that is not complete. Nobody else uses such names."""


def temporary_name() -> str:
    return f"{TEMPORARY}{uuid.uuid4().hex}"


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Yields a temporary file, which replaces a local file at the end of the block."""
    with temporary_beside(path) as (file, temporary):
        yield file
        flush(file)
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_beside(path: str) -> Iterator[tuple[IO[bytes], str]]:
    """Yields a new file in the folder of a local path, and its path, and deletes it at the end."""
    temporary = os.path.join(os.path.dirname(os.path.abspath(path)), temporary_name())
    try:
        with open(temporary, "xb") as file:  # with the permissions of the user's umask
            yield file, temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def flush(file: IO[bytes]) -> None:
    """Waits until the content of a local file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def save(stream: Stream, file: Path) -> None:
    """Writes a stream to a local file, or replaces the file, atomically.

    Raises:
        ConnectionError: The stream ends early.
    """
    with replacing(str(file)) as target:
        while part := stream.read(_BUFFER_BYTES):
            target.write(part)
        if stream.length is not None and target.tell() != stream.length:
            raise ConnectionError(f"{target.tell()} bytes of {stream.length} were received")


class Store(Protocol):
    """A file store.

    Its methods raise ``FileNotFoundError`` if a path does not exist, ``PermissionError`` if it may
    not be read or written, ``UnsupportedURIError`` if the store cannot do this, ``SettingsError``,
    and the exceptions of its library, after which a retry may
    succeed.
    """

    def stream(
        self, location: Location, roots: tuple[Location, ...] = ()
    ) -> AbstractContextManager[Stream]:
        """Opens a file from its start, with one request.

        Raises:
            ForbiddenError: A link or redirect leads outside ``roots``.
        """

    def open(self, location: Location) -> Any:
        """Opens a file and returns a seekable file object."""

    def entry(self, location: Location) -> Entry:
        """Describes a path."""

    def entries(self, folder: Location) -> Iterator[Entry]:
        """Yields the entries of a folder, in no particular order."""

    def create(self, location: Location, data: bytes) -> None:
        """Writes a new file, atomically. Of several callers, one succeeds.

        Raises:
            FileExistsError: It exists.
        """

    def write(self, location: Location, data: bytes) -> None:
        """Writes a file, or replaces it, atomically, and makes the folders above it."""

    def upload(self, location: Location, file: Path) -> None:
        """Writes a file, as ``write`` does, from a local file of any size."""

    def download(self, location: Location, file: Path) -> None:
        """Writes a local file, or replaces it, atomically, from a file of any size."""

    def move(self, source: Location, target: Location) -> None:
        """Renames a file of this store, and replaces the target if it exists."""

    def delete(self, location: Location) -> None:
        """Deletes a file, or a folder with its contents, if it exists."""

    def delete_empty(self, location: Location) -> None:
        """Deletes a folder if it exists and is empty."""


def store_of(location: Location) -> Store:
    """Returns the store of a location.

    Raises:
        UnsupportedURIError: The URI is malformed or its scheme is not supported.
        ImportError: The package for the scheme is not installed.
        SettingsError: The store's settings are not valid.
    """
    module = importlib.import_module(
        f"imagevec.storage.{_MODULES.get(location.store_scheme, 'other')}"
    )
    key = (location.store_scheme, *module.client_key(location))
    return _the_one(key, lambda: cast(Store, module.store_of(location)))


_stores: OrderedDict[tuple[str, ...], Future[Store]] = OrderedDict()
_lock = threading.Lock()


def _the_one(key: tuple[str, ...], make: Callable[[], Store]) -> Store:
    """Returns the store of a key, made on first use. A slow one does not block other keys."""
    with _lock:
        is_new = key not in _stores
        future = _stores.setdefault(key, Future())
        _stores.move_to_end(key)
        if len(_stores) > _MAX_STORES:
            _stores.popitem(last=False)
    if is_new:
        try:
            future.set_result(make())
        except BaseException as error:
            with _lock:
                _stores.pop(key, None)
            future.set_exception(error)
    return future.result()
