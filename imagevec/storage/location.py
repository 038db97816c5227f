"""Locations of files and folders: local paths and URIs, parsed once.

This module alone knows the spellings of paths: ``file:``, ``dbfs:``, ``~``, percent-encoding,
Hadoop's names of schemes, and relative paths, which start from the folder of this process.
"""

from __future__ import annotations

import errno
import os
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

LOCAL = "file"

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_PREFIX = re.compile(r"(file):(.*)|(local)://(.*)|(dbfs):(/.*)", re.DOTALL | re.IGNORECASE)
_SAME_SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "wasb": "abfs", "wasbs": "abfss"}
_NO_SUCH_NAME = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


class UnsupportedURIError(Exception):
    """A URI is malformed or has an unsupported scheme."""


class ForbiddenError(Exception):
    """A location is not under any of the allowed roots."""


@dataclass(frozen=True)
class Location:
    """Where a file or folder is.

    Attributes:
        scheme: The scheme in lower case; ``file`` for a local path.
        host: The bucket, host or account of a URI, with its user, as written.
        path: A local path; of a URI, the rest before the query, as written.
        query: The query of a URI, as written: settings of a store, or a part of a web address.
    """

    scheme: str
    host: str
    path: str
    query: str = ""

    @classmethod
    def parse(cls, text: str) -> Location:
        """Parses a path or URI from a row. Any text without a scheme is a local path."""
        local = _PREFIX.match(text)
        if local:
            prefix, path = filter(lambda part: part is not None, local.groups())
            return cls(LOCAL, "", _local(prefix.lower(), path))
        uri = _URI.match(text)
        if not uri:
            return cls(LOCAL, "", text)
        place, _, query = uri[2].partition("?")
        host, slash, path = place.partition("/")
        return cls(uri[1].lower(), host, slash + path, query)

    @classmethod
    def of(cls, text: str | Path) -> Location:
        """Parses a path or URI from a person. Local paths become absolute, after ``~``."""
        location = cls.parse(str(text))
        if not location.is_local:
            return location
        return replace(location, path=os.path.abspath(os.path.expanduser(location.path)))

    @property
    def is_local(self) -> bool:
        return self.scheme == LOCAL

    @property
    def is_web(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def store_scheme(self) -> str:
        """The scheme without Hadoop's spellings: ``s3`` for ``s3a``."""
        return _SAME_SCHEMES.get(self.scheme, self.scheme)

    @property
    def key(self) -> str:
        """The path of a URI without percent-encoding and the first slash."""
        return urllib.parse.unquote(self.path).removeprefix("/")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        """The local path, or the URI."""
        if self.is_local:
            return self.path
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{self.host}{self.path}{query}"

    @property
    def uri(self) -> str:
        """The URI, with ``file:`` before a local path, as in Spark's ``binaryFile``."""
        return f"file:{self.path}" if self.is_local else str(self)

    def sibling(self, path: str) -> Location:
        """Returns another path in the same store."""
        return replace(self, path=path)

    def existing(self) -> Location:
        """Returns a local path, unquoted if only that exists: ``_metadata.file_path`` is quoted."""
        if not self.is_local:
            return self
        try:
            os.stat(self.path)
        except OSError as error:  # other errors do not mean that the path does not exist
            if error.errno in _NO_SUCH_NAME:
                return self.sibling(urllib.parse.unquote(self.path))
        return self

    def resolved(self) -> Location:
        """Returns an absolute local path without symbolic links; a URI unchanged."""
        if not self.is_local:
            return self
        return self.sibling(os.path.realpath(self.existing().path))

    def contains(self, other: Location) -> bool:
        """Returns whether another location is this one, or below it.

        Local paths must be ``resolved``. A root without a host, such as ``s3://``, contains all
        locations of its scheme. Otherwise the settings in the query must be equal, but a web
        address may have any query.
        """
        if self.store_scheme != other.store_scheme:
            return False
        if not self.is_local and not self.host and not self.path:
            return ".." not in other._parts
        same_store = self._host == other._host and (self.is_web or self.query == other.query)
        own = self._parts
        return same_store and ".." not in other._parts and other._parts[: len(own)] == own

    @property
    def _host(self) -> str:
        """The host without differences that do not matter on the web."""
        if not self.is_web:
            return self.host
        default = ":443" if self.scheme == "https" else ":80"
        return self.host.lower().removesuffix(default)

    @property
    def _parts(self) -> list[str]:
        plain = self.path if self.is_local else urllib.parse.unquote(self.path)
        return [part for part in plain.split("/") if part]


def resolve_roots(roots: Iterable[str]) -> tuple[Location, ...]:
    """Parses ``allowed_roots``, and resolves the symbolic links of local ones."""
    return tuple(Location.of(root).resolved() for root in roots)


def check_allowed(location: Location, roots: tuple[Location, ...]) -> None:
    """Raises ``ForbiddenError`` unless a resolved location is under a root, or there are none."""
    if roots and not any(root.contains(location) for root in roots):
        raise ForbiddenError(f"{location} is not under any of allowed_roots")


def _local(prefix: str, path: str) -> str:
    """Returns the local path after ``file:``, ``local:`` or ``dbfs:``, with any slashes."""
    plain = "/" + path.lstrip("/") if path.startswith("/") else path
    is_mounted = prefix == "dbfs" and not plain.startswith(("/Volumes/", "/dbfs/"))
    return f"/dbfs/{plain.lstrip('/')}" if is_mounted else plain
