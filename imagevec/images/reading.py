"""Paths and URIs to bytes, ahead of their turn."""

from __future__ import annotations

import functools
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyarrow import fs

from imagevec.errors import ImageError
from imagevec.images.parallel import map_ahead
from imagevec.images.values import Value

_READ_THREADS = 8
_MAX_READ_AHEAD = 16  # files that are held in memory before their turn


def read_ahead(values: Iterable[Value], allowed_roots: Sequence[str] = ()) -> Iterator[Value]:
    """The values in order, with paths replaced by what is read there, or by why it cannot be.

    A few files are read at a time, in threads, so that slow storage overlaps decoding and the
    forward pass. ``allowed_roots`` is the one of ``read``.
    """
    read_value = functools.partial(_read_or_error, allowed_roots=allowed_roots)
    return map_ahead(read_value, values, _READ_THREADS, _MAX_READ_AHEAD, is_slow=_is_path)


def _is_path(value: Value) -> bool:
    return isinstance(value.data, str)


def _read_or_error(value: Value, allowed_roots: Sequence[str]) -> Value:
    if not isinstance(value.data, str):
        return value
    try:
        return value._replace(data=read(value.data, allowed_roots))
    except ImageError as error:
        return value._replace(data=error)


def read(path: str, allowed_roots: Sequence[str] = ()) -> bytes:
    """The bytes of a file: a local path, or a URI that ``pyarrow.fs`` knows (s3, gs, hdfs, file).

    Args:
        path: Relative local paths are of the worker's folder.
        allowed_roots: Folders, or prefixes of URIs (``"s3://bucket/photos"``, ``"s3://"``), outside
            of which nothing is read; any file may be, if there are none. Symbolic links and ``..``
            are followed before the question is asked.

    Raises:
        ImageError: ``unreadable_path`` or ``forbidden_path``.
    """
    scheme, colon, rest = path.partition(":")
    try:
        if not colon or scheme == "file":
            return _read_local(rest if colon else path, allowed_roots, given=path)
        uri = urllib.parse.quote(path, safe="/:%@?=&+,;~")  # Spark's paths hold spaces as they are
        if allowed_roots and not (_is_under(uri, allowed_roots) and ".." not in uri.split("/")):
            raise ImageError("forbidden_path", f"{path} is under none of allowed_roots")
        filesystem, path_in_it = fs.FileSystem.from_uri(uri)
        with filesystem.open_input_stream(path_in_it) as stream:
            data: bytes = stream.read()
            return data
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ImageError("unreadable_path", f"{path}: {error}") from error


def _read_local(path: str, allowed_roots: Sequence[str], given: str) -> bytes:
    path = "/" + path.lstrip("/") if path.startswith("/") else path  # file:/a and file:///a
    if not os.path.exists(path):
        path = urllib.parse.unquote(path)  # the file_path of Spark's _metadata is quoted
    real = os.path.realpath(path)
    local_roots = [
        os.path.realpath("/" + root.removeprefix("file:").lstrip("/"))
        if root.startswith(("file:", "/"))
        else root
        for root in allowed_roots
    ]
    if allowed_roots and not _is_under(real, local_roots):
        raise ImageError("forbidden_path", f"{given} is under none of allowed_roots")
    if os.path.exists(real) and not os.path.isfile(real):  # a pipe or a device would not end
        raise ImageError("unreadable_path", f"{given}: not a file")
    return Path(real).read_bytes()


def _is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
