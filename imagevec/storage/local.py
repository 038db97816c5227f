"""Local files, which include mounted ones."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagevec.storage.location import Location, check_allowed
from imagevec.storage.stores import (
    Entry,
    Stream,
    flush,
    replacing,
    save,
    temporary_beside,
)

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its other end
# What mounted stores, which have no hard links, answer.
_NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_COPY_BYTES = 1 << 20
_WALKS = os.open in os.supports_dir_fd and bool(_NO_LINKS)


def client_key(location: Location) -> tuple[str, ...]:
    return ()


def store_of(location: Location) -> LocalStore:
    return LocalStore()


class LocalStore:
    @contextlib.contextmanager
    def stream(self, location: Location, roots: tuple[Location, ...] = ()) -> Iterator[Stream]:
        location = location.resolved() if roots else location.existing()
        check_allowed(location, roots)
        _check_regular(os.stat(location.path), location)
        opened = _opened_without_links if roots else _opened
        number = opened(location.path)
        try:
            status = os.fstat(number)
            _check_regular(status, location)
            yield Stream(functools.partial(os.read, number), status.st_size)
        finally:
            os.close(number)

    def open(self, location: Location) -> Any:
        return open(location.existing().path, "rb")  # noqa: SIM115

    def entry(self, location: Location) -> Entry:
        os.lstat(path := location.existing().path)
        return _entry(os.path.abspath(path))

    def entries(self, folder: Location) -> Iterator[Entry]:
        with os.scandir(folder.existing().path) as items:
            for item in items:
                yield _entry(item.path)

    def create(self, location: Location, data: bytes) -> None:
        _make_folder_of(location.path)
        with temporary_beside(location.path) as (file, temporary):
            file.write(data)
            flush(file)
            _link(temporary, location.path, data)

    def write(self, location: Location, data: bytes) -> None:
        _make_folder_of(location.path)
        with replacing(location.path) as file:
            file.write(data)

    def upload(self, location: Location, file: Path) -> None:
        _make_folder_of(location.path)
        with open(file, "rb") as source, replacing(location.path) as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def download(self, location: Location, file: Path) -> None:
        with self.stream(location) as stream:
            save(stream, file)

    def move(self, source: Location, target: Location) -> None:
        os.lstat(source.path)  # before a folder is made
        _make_folder_of(target.path)
        os.replace(source.path, target.path)

    def delete(self, location: Location) -> None:
        path = location.path
        while os.path.lexists(path):
            with contextlib.suppress(FileNotFoundError):  # another process also deletes
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)

    def delete_empty(self, location: Location) -> None:
        try:
            os.rmdir(location.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def _make_folder_of(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", folder) from error


def _link(temporary: str, path: str, data: bytes) -> None:
    """Gives a complete file another name, which must not exist.

    On a mount without hard links, it writes a new file of that name, whose content readers may see
    before it is complete.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        if os.stat(temporary).st_nlink == 1:  # else NFS sent the request again
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _write_new(path, data)


def _write_new(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        try:
            file.write(data)
            flush(file)
        except BaseException:
            os.unlink(path)
            raise


def _check_regular(status: os.stat_result, location: Location) -> None:
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or device might not end
        raise IsADirectoryError(f"{location}: not a file")


def _opened(path: str) -> int:
    return os.open(path, os.O_RDONLY | _NO_WAIT)


def _opened_without_links(path: str) -> int:
    """Opens an absolute path, and fails if a part of it has become a link since it was checked."""
    if not _WALKS:
        return os.open(path, os.O_RDONLY | _NO_LINKS | _NO_WAIT)
    folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    *folders, name = path.split("/")[1:]
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _NO_LINKS, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name or ".", os.O_RDONLY | _NO_LINKS | _NO_WAIT, dir_fd=folder)
    finally:
        os.close(folder)


def _entry(path: str) -> Entry:
    name, uri = os.path.basename(path), Location("file", "", path).uri
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # or just deleted
            return Entry(uri, name, "dangling")
        raise
    if stat.S_ISDIR(status.st_mode):
        return Entry(uri, name, "folder")
    if not stat.S_ISREG(status.st_mode):
        return Entry(uri, name, "other")
    return Entry(uri, name, "file", status.st_size, status.st_mtime_ns // 1000)
