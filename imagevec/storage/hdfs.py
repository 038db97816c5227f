"""HDFS, through Arrow's client, which needs Hadoop's libraries on the machine."""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

from pyarrow import fs

from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.stores import Entry, Stream


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
