"""HDFS, through Arrow's client, which needs Hadoop's libraries on the machine."""

from __future__ import annotations

import contextlib
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.stores import Entry, Stream, save, temporary_name

_COPY_BYTES = 1 << 20


def client_key(location: Location) -> tuple[str, ...]:
    return location.host, location.query


def store_of(location: Location) -> HadoopStore:
    if not location.host:  # Hadoop's settings name it
        return HadoopStore(fs.HadoopFileSystem("default"))
    query = f"?{location.query}" if location.query else ""
    return HadoopStore(fs.HadoopFileSystem.from_uri(f"hdfs://{location.host}/{query}"))


class HadoopStore:
    def __init__(self, client: Any) -> None:
        self._client = client

    @contextlib.contextmanager
    def stream(self, location: Location, roots: tuple[Location, ...] = ()) -> Iterator[Stream]:
        with self.open(location) as file:
            yield Stream(file.read, file.size())

    def open(self, location: Location) -> Any:
        return self._client.open_input_file(_path(location))

    def entry(self, location: Location) -> Entry:
        return _entry(self._client.get_file_info(_path(location)), location)

    def entries(self, folder: Location) -> Iterator[Entry]:
        for info in self._client.get_file_info(fs.FileSelector(_path(folder))):
            yield _entry(info, folder)

    def create(self, location: Location, data: bytes) -> None:
        raise UnsupportedURIError(f"{location.scheme}:// has no conditional writes")

    def write(self, location: Location, data: bytes) -> None:
        with self._replacing(location) as target:
            target.write(data)

    def upload(self, location: Location, file: Path) -> None:
        with open(file, "rb") as source, self._replacing(location) as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def download(self, location: Location, file: Path) -> None:
        with self.stream(location) as stream:
            save(stream, file)

    def move(self, source: Location, target: Location) -> None:
        self.entry(source)
        self._client.create_dir(_folder(_path(target)), recursive=True)
        self._client.move(_path(source), _path(target))

    def delete(self, location: Location) -> None:
        path = _path(location)
        kind = self._client.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self._client.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            self._client.delete_file(path)

    def delete_empty(self, location: Location) -> None:
        if not self._client.get_file_info(fs.FileSelector(_path(location), allow_not_found=True)):
            self.delete(location)

    @contextlib.contextmanager
    def _replacing(self, location: Location) -> Iterator[Any]:
        """Yields a temporary file, which replaces a file at the end of the block."""
        path = _path(location)
        temporary = f"{_folder(path)}/{temporary_name()}"
        self._client.create_dir(_folder(path), recursive=True)
        with self._client.open_output_stream(temporary) as target:
            yield target
        self._client.move(temporary, path)


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _path(location: Location) -> str:
    return urllib.parse.unquote(location.path).rstrip("/") or "/"


def _entry(info: Any, beside: Location) -> Entry:
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{info.path} does not exist")
    path = str(beside.sibling(info.path.replace("%", "%25").replace("?", "%3F")))
    if info.type == fs.FileType.Directory:
        return Entry(path, info.base_name, "folder")
    modified = info.mtime_ns // 1000 if info.mtime_ns is not None else None
    return Entry(path, info.base_name, "file", info.size, modified)
