"""All other schemes, through the packages of fsspec that are installed."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.stores import Entry, SettingsError, Stream, save, temporary_name

# They lead to other stores or to local files, past the checks of these.
_REFUSED = {
    *("asynclocal", "asyncwrapper", "blockcache", "cached", "dir", "dvc", "file", "filecache"),
    *("generic", "git", "libarchive", "local", "reference", "simplecache", "tar", "zip"),
}


def client_key(location: Location) -> tuple[str, ...]:
    return (location.host,)


def store_of(location: Location) -> FsspecStore:
    scheme = location.scheme
    try:
        import fsspec
    except ImportError as error:
        raise UnsupportedURIError(
            f"the scheme {scheme}:// is not supported, or needs a package of fsspec: "
            "pip install 'imagevec[fsspec]'"
        ) from error
    known = {*fsspec.available_protocols(), *fsspec.registry} - _REFUSED
    if scheme not in known or "::" in str(location):
        raise UnsupportedURIError(f"the scheme {scheme}:// is not supported")
    try:
        # fsspec's own cache has a client per thread.
        client, _ = fsspec.core.url_to_fs(f"{scheme}://{location.host}/", skip_instance_cache=True)
    except TypeError as error:  # it needs more than a URI
        raise UnsupportedURIError(f"{scheme}:// cannot be read: {error}") from error
    except (ValueError, FileNotFoundError) as error:  # caused by settings, not by the path
        raise SettingsError(f"cannot create a client for {scheme}://: {error}") from error
    return FsspecStore(client)


class FsspecStore:
    def __init__(self, client: Any) -> None:
        self._client = client

    @contextlib.contextmanager
    def stream(self, location: Location, roots: tuple[Location, ...] = ()) -> Iterator[Stream]:
        with self.open(location) as file:
            yield Stream(file.read, getattr(file, "size", None))

    def open(self, location: Location) -> Any:
        return self._client.open(str(location), "rb")

    def entry(self, location: Location) -> Entry:
        self._client.invalidate_cache()
        return _entry(self._client.info(str(location)), str(location))

    def entries(self, folder: Location) -> Iterator[Entry]:
        self._client.invalidate_cache()  # the cache holds earlier listings
        for info in self._client.ls(str(folder), detail=True):
            path = info["name"]
            if "://" not in path:  # clients may omit the host
                path = f"{str(folder).rstrip('/')}/{path.rstrip('/').rpartition('/')[2]}"
            yield _entry(info, path)

    def create(self, location: Location, data: bytes) -> None:
        raise UnsupportedURIError(f"{location.scheme}:// has no conditional writes")

    def write(self, location: Location, data: bytes) -> None:
        with self._replacing(location) as temporary:
            self._client.pipe_file(temporary, data)

    def upload(self, location: Location, file: Path) -> None:
        with self._replacing(location) as temporary:
            self._client.put_file(str(file), temporary)

    def download(self, location: Location, file: Path) -> None:
        with self.stream(location) as stream:
            save(stream, file)

    def move(self, source: Location, target: Location) -> None:
        self.entry(source)
        self._client.makedirs(_folder(target), exist_ok=True)
        self._client.mv(str(source), str(target))

    def delete(self, location: Location) -> None:
        self._client.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._client.rm(str(location), recursive=True)

    def delete_empty(self, location: Location) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not any(True for _ in self.entries(location)):
                self.delete(location)

    @contextlib.contextmanager
    def _replacing(self, location: Location) -> Iterator[str]:
        """Yields a temporary path; what is written there replaces a file at the end."""
        folder = _folder(location)
        temporary = f"{folder}/{temporary_name()}"
        self._client.makedirs(folder, exist_ok=True)
        yield temporary
        self._client.mv(temporary, str(location))


def _folder(location: Location) -> str:
    return str(location).rstrip("/").rpartition("/")[0]


def _entry(info: dict[str, Any], path: str) -> Entry:
    name = path.rstrip("/").rpartition("/")[2]
    if info["type"] == "directory":
        return Entry(path, name, "folder")
    when = next((info[k] for k in ("mtime", "LastModified", "last_modified") if k in info), None)
    if isinstance(when, datetime.datetime):
        when = when.timestamp()
    modified = int(when * 1e6) if isinstance(when, int | float) else None
    return Entry(path, name, "file", info.get("size") or 0, modified)
