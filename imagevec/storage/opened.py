"""Files that are read piece by piece, with retries from where a read has failed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

from imagevec.options import DEFAULTS
from imagevec.storage.location import Location
from imagevec.storage.retry import retried
from imagevec.storage.stores import store_of

_BUFFER_BYTES = 1 << 16

T = TypeVar("T")


def open_file(location: Location, timeout_seconds: float = DEFAULTS["read_timeout_seconds"]) -> Any:
    """Opens a file for reading, and returns a seekable file object.

    Args:
        location: The file.
        timeout_seconds: How long it is opened, and each read is repeated, if it fails.

    Raises:
        FileNotFoundError: The file does not exist.
        ReadError: The store does not answer within the timeout, or only a person can help. Reads
            raise it, too.
    """
    if location.is_local:
        return retried(location, lambda: store_of(location).open(location), timeout_seconds)
    return io.BufferedReader(_RetriedFile(location, timeout_seconds), _BUFFER_BYTES)


class _RetriedFile(io.RawIOBase):
    def __init__(self, location: Location, timeout_seconds: float) -> None:
        self._location = location
        self._timeout_seconds = timeout_seconds
        self._file: Any = None
        self._position = 0
        self._repeat(lambda file: file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count: int = self._repeat(lambda file: file.readinto(buffer))
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = self._repeat(lambda file: file.seek(offset, whence))
        return self._position

    def close(self) -> None:
        self._end()
        super().close()

    def _repeat(self, action: Callable[[Any], T]) -> T:
        """Calls an action on the file. If it fails, opens the file again and repeats it."""

        def attempt() -> T:
            try:
                if self._file is None:
                    self._file = store_of(self._location).open(self._location)
                    self._file.seek(self._position)
                return action(self._file)
            except BaseException:
                self._end()
                raise

        return retried(self._location, attempt, self._timeout_seconds, any_size=True)

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
