"""File storage: local files, object stores and HTTP, with one client for each.

Local files are read directly, ``s3``, ``gs`` and ``hdfs`` through Arrow's file systems, and all
other schemes through fsspec, if it supports them. Arrow's Azure client is not used, because it ends
the process if credentials are missing. Clients have their own timeouts and live as long as the
process.
"""

from __future__ import annotations

import datetime
import errno
import os
import re
import stat
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pyarrow import fs

from imagevec.errors import MissingExtraError

CONNECT_SECONDS = 10
REQUEST_SECONDS = 60

# Hadoop's and Arrow's spellings of schemes.
_ARROW_SCHEMES = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs", "hdfs": "hdfs"}
_NEED_FSSPEC = ("http", "https", "abfs", "abfss", "wasb", "wasbs")  # fsspec itself may lack some
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_NOT_FOUND = (404, 410)  # HTTP statuses; fsspec only handles 404, and not everywhere
_NO_SUCH_NAME = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


class UnsupportedURIError(Exception):
    """A URI is malformed or has an unsupported scheme."""


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


class Store(Protocol):
    """A file store. Its methods raise ``FileNotFoundError`` if a path does not exist."""

    def read(self, path: str) -> bytes:
        """Returns the bytes of a file."""

    def open(self, path: str) -> Any:
        """Opens a file and returns a seekable file object."""

    def entry(self, path: str) -> Entry:
        """Describes a path."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yields the entries of a folder, in no particular order."""


def store_of(path: str) -> Store:
    """Returns the store of a path or URI.

    Raises:
        UnsupportedURIError: The URI is malformed or its scheme is not supported.
        ImportError: The package for the scheme is not installed.
    """
    scheme = scheme_of(path)
    if scheme == "file":
        return _LOCAL
    netloc = urllib.parse.urlsplit(path.partition("?")[0]).netloc
    if scheme in _ARROW_SCHEMES:
        query = path.partition("?")[2]
        if not netloc and scheme != "hdfs":  # Hadoop's settings may name the hdfs host
            raise UnsupportedURIError(f"the URI has no bucket or host after {scheme}://")
        return _the_one((scheme, netloc, query), lambda: _arrow_store(scheme, netloc, query))
    place = "" if scheme in ("http", "https") else netloc  # one HTTP client serves all hosts
    return _the_one((scheme, place), lambda: _fsspec_store(scheme, f"{scheme}://{netloc}/"))


def scheme_of(path: str) -> str:
    """Returns the scheme in lower case; ``file`` for a path, which may contain a colon."""
    match = _SCHEME.match(path)
    return match[1].lower() if match else "file"


def local_path(path: str) -> str:
    """Returns the local path of ``path``, ``file:/path`` or ``file:///path``."""
    rest = path[len("file:") :] if path[:5].lower() == "file:" else path
    return "/" + rest.lstrip("/") if rest.startswith("/") else rest


def existing_path(path: str) -> str:
    """Returns ``local_path``, unquoted if only that exists: ``_metadata.file_path`` is quoted."""
    plain = local_path(path)
    try:
        os.stat(plain)
    except OSError as error:  # other errors do not mean that the path does not exist
        return urllib.parse.unquote(plain) if error.errno in _NO_SUCH_NAME else plain
    return plain


_stores: dict[tuple[str, ...], Store] = {}
_locks: dict[tuple[str, ...], threading.Lock] = {}
_lock = threading.Lock()


def _the_one(key: tuple[str, ...], make: Callable[[], Store]) -> Store:
    """Returns the store of a key, made on first use. A slow one does not block other keys."""
    with _lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _stores:
            _stores[key] = make()
        return _stores[key]


class _LocalStore:
    def read(self, path: str) -> bytes:
        real = os.path.realpath(existing_path(path))
        if os.path.exists(real) and not os.path.isfile(real):  # reading a pipe might not end
            raise IsADirectoryError(f"{path}: not a file")
        return Path(real).read_bytes()

    def open(self, path: str) -> Any:
        return open(existing_path(path), "rb")  # noqa: SIM115

    def entry(self, path: str) -> Entry:
        os.lstat(plain := existing_path(path))
        return self._entry(os.path.abspath(plain))

    def entries(self, folder: str) -> Iterator[Entry]:
        with os.scandir(existing_path(folder)) as found:
            for item in found:
                yield self._entry(item.path)

    def _entry(self, path: str) -> Entry:
        name, uri = os.path.basename(path), f"file:{path}"  # as in Spark's binaryFile
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


_LOCAL = _LocalStore()


class _ArrowStore:
    def __init__(self, client: Any, prefix: str, query: str) -> None:
        self._client = client
        self._prefix = prefix  # turns a path of the client into a URI
        self._query = f"?{query}" if query else ""

    def read(self, path: str) -> bytes:
        with self._client.open_input_stream(self._place(path)) as stream:
            data: bytes = stream.read()
            return data

    def open(self, path: str) -> Any:
        return self._client.open_input_file(self._place(path))

    def entry(self, path: str) -> Entry:
        return self._entry(self._client.get_file_info(self._place(path)))

    def entries(self, folder: str) -> Iterator[Entry]:
        yield from map(
            self._entry, self._client.get_file_info(fs.FileSelector(self._place(folder)))
        )

    def _place(self, uri: str) -> str:
        host, slash, path = uri.partition("?")[0].partition("://")[2].partition("/")
        bucket = host.rpartition("@")[2] if self._in_bucket else ""
        return urllib.parse.unquote(bucket + slash + path).rstrip("/") or "/"

    @property
    def _in_bucket(self) -> bool:
        return not isinstance(self._client, fs.HadoopFileSystem)

    def _entry(self, info: Any) -> Entry:
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(f"{info.path} does not exist")
        quoted = urllib.parse.quote(info.path, safe="/ !\"#$&'()*+,-.:;<=>@[]^_`{|}~")
        path = self._prefix + quoted + self._query
        if info.type == fs.FileType.Directory:
            return Entry(path, info.base_name, "folder")
        modified = info.mtime_ns // 1000 if info.mtime_ns is not None else None
        return Entry(path, info.base_name, "file", info.size, modified)


def _arrow_store(scheme: str, netloc: str, query: str) -> Store:
    # strict_parsing rejects other queries: they belong to keys with an unquoted question mark.
    options = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
    user, _, host = netloc.rpartition("@")
    prefix = f"{scheme}://" + (f"{user}@" if user else "")
    kind = _ARROW_SCHEMES[scheme]
    if kind == "hdfs":
        uri = f"{kind}://{netloc}/" + (f"?{query}" if query else "")
        hdfs = fs.HadoopFileSystem.from_uri(uri) if host else fs.HadoopFileSystem("default")
        return _ArrowStore(hdfs, f"{scheme}://{netloc}", query)
    try:
        client = _s3(host, user, options) if kind == "s3" else _gs(user, options)
    except TypeError as error:
        raise UnsupportedURIError(str(error)) from error
    return _ArrowStore(client, prefix, query)


def _s3(bucket: str, user: str, options: dict[str, str]) -> Any:
    """``options`` are those that Arrow accepts in a URI: ``region``, ``endpoint_override``, ..."""
    access_key, _, secret_key = (urllib.parse.unquote(part) for part in user.partition(":"))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:  # Arrow only reads these in from_uri
        scheme, _, host = endpoint.rstrip("/").rpartition("://")
        options = {"scheme": scheme or "https", **options, "endpoint_override": host}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if "region" not in options and "endpoint_override" not in options:
        options = {**options, "region": region or fs.resolve_s3_region(bucket)}
    timeouts = {"connect_timeout": CONNECT_SECONDS, "request_timeout": REQUEST_SECONDS}
    return fs.S3FileSystem(
        access_key=access_key or None, secret_key=secret_key or None, **timeouts, **options
    )


def _gs(user: str, options: dict[str, str]) -> Any:
    limit = datetime.timedelta(seconds=float(options.pop("retry_limit_seconds", "10")))
    return fs.GcsFileSystem(anonymous=user == "anonymous", retry_time_limit=limit, **options)


class _FsspecStore:
    def __init__(self, client: Any) -> None:
        self._client = client

    def read(self, path: str) -> bytes:
        try:
            data: bytes = self._client.cat_file(self._client._strip_protocol(path))
        except Exception as error:
            if getattr(error, "status", None) in _NOT_FOUND:
                raise FileNotFoundError(f"{path} does not exist") from error
            raise
        return data

    def open(self, path: str) -> Any:
        return self._client.open(path, "rb")

    def entry(self, path: str) -> Entry:
        self._client.invalidate_cache()
        try:
            info = self._client.info(path)
        except FileNotFoundError as error:
            # fsspec's HTTP client raises this for any failure, even if the server is down.
            failure = error.__cause__
            if failure is None or getattr(failure, "status", None) in _NOT_FOUND:
                raise
            raise failure from None
        return self._entry(info, path)

    def entries(self, folder: str) -> Iterator[Entry]:
        self._client.invalidate_cache()  # the cache holds earlier listings
        for info in self._client.ls(folder, detail=True):
            path = info["name"]
            if "://" not in path:  # HTTP returns whole URLs; other clients may omit the host
                path = f"{folder.rstrip('/')}/{path.rstrip('/').rpartition('/')[2]}"
            yield self._entry(info, path)

    def _entry(self, info: dict[str, Any], path: str) -> Entry:
        name = path.rstrip("/").rpartition("/")[2]
        if info["type"] == "directory" or path.endswith("/"):  # HTTP reports all as files
            return Entry(path, name, "folder")
        when = next(
            (info[k] for k in ("mtime", "LastModified", "last_modified") if k in info), None
        )
        if isinstance(when, datetime.datetime):
            when = when.timestamp()
        modified = int(when * 1e6) if isinstance(when, int | float) else None
        return Entry(path, name, "file", info.get("size") or 0, modified)


def _fsspec_store(scheme: str, uri: str) -> Store:
    try:
        import fsspec
    except ImportError as error:
        if scheme in _NEED_FSSPEC:
            raise MissingExtraError("fsspec", "fsspec") from error
        raise UnsupportedURIError(f"the scheme {scheme}:// is not supported") from error
    if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
        if scheme in _NEED_FSSPEC:
            raise ImportError(f"{scheme}:// needs the package adlfs: pip install adlfs")
        raise UnsupportedURIError(f"the scheme {scheme}:// is not supported")
    try:
        # fsspec's own cache has a client per thread.
        client, _ = fsspec.core.url_to_fs(uri, skip_instance_cache=True, **_timeouts(scheme))
    except TypeError as error:  # it wraps another file system, or needs more than a URI
        raise UnsupportedURIError(f"{scheme}:// cannot be read: {error}") from error
    except (ValueError, FileNotFoundError) as error:  # caused by settings, not by the path
        raise ConnectionError(f"cannot create a client for {scheme}://: {error}") from error
    return _FsspecStore(client)


def _timeouts(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=CONNECT_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}
