"""Reads the bytes of paths and URIs ahead of the decoder.

A file that does not exist is a bad image. If a file cannot be read for any other reason, the read
is retried and finally fails the task. A null therefore always means that reading again would also
return a null.
"""

from __future__ import annotations

import functools
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

from imagevec.errors import ImageError
from imagevec.images.parallel import map_ahead
from imagevec.images.values import Value
from imagevec.options import DEFAULTS
from imagevec.storage.retry import retried
from imagevec.storage.stores import (
    UnsupportedURIError,
    existing_path,
    local_path,
    scheme_of,
    store_of,
)

_READ_THREADS = 8
_MAX_READ_AHEAD = 16  # files kept in memory before they are decoded


def read_ahead(
    values: Iterable[Value],
    allowed_roots: Sequence[str] = (),
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
) -> Iterator[Value]:
    """Yields the values in order, with each path replaced by the file's bytes or by an error.

    Several files are read concurrently in threads, so that slow storage overlaps decoding and the
    forward pass. The other arguments and the exceptions are those of ``read``.
    """
    read_value = functools.partial(
        _read_or_error, allowed_roots=allowed_roots, timeout_seconds=timeout_seconds
    )
    return map_ahead(read_value, values, _READ_THREADS, _MAX_READ_AHEAD, is_slow=_is_path)


def _is_path(value: Value) -> bool:
    return isinstance(value.data, str)


def _read_or_error(value: Value, allowed_roots: Sequence[str], timeout_seconds: float) -> Value:
    if not isinstance(value.data, str):
        return value
    try:
        return value._replace(data=read(value.data, allowed_roots, timeout_seconds))
    except ImageError as error:
        return value._replace(data=error)


def read(
    path: str,
    allowed_roots: Sequence[str] = (),
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
) -> bytes:
    """Reads a file.

    Args:
        path: A local path, or a URI with a scheme that ``stores`` supports. Relative paths start
            from the worker's folder.
        allowed_roots: Folders and URI prefixes (``"s3://bucket/photos"``, ``"s3://"``) under which
            the file must be; if empty, any file may be read. Symbolic links and ``..`` are resolved
            before this check.
        timeout_seconds: The time after which a failed read is no longer retried. The pause between
            attempts roughly doubles each time.

    Raises:
        ImageError: ``forbidden_path``, or ``unreadable_path``, which a retry would not change.
        ReadError: The read failed for another reason.
    """
    if allowed_roots and not _is_allowed(path, allowed_roots):
        raise ImageError("forbidden_path", f"{path} is not under any of allowed_roots")
    try:
        return retried(path, lambda: store_of(path).read(path), timeout_seconds)
    except (UnsupportedURIError, OSError, ValueError) as error:
        raise ImageError("unreadable_path", f"{path}: {error}") from error


def _is_allowed(path: str, allowed_roots: Sequence[str]) -> bool:
    scheme = scheme_of(path)
    if scheme != "file":
        place, _, query = _quoted(path).partition("?")
        settings = "" if scheme in ("http", "https") else query  # for example an endpoint
        roots = [_quoted(root).partition("?") for root in allowed_roots]
        same = [root for root, _, theirs in roots if theirs == settings or root.endswith("://")]
        return _is_under(place, same) and ".." not in urllib.parse.unquote(place).split("/")
    try:
        real = os.path.realpath(existing_path(path))
    except ValueError:
        return False
    local_roots = [
        os.path.realpath(local_path(root)) if root.startswith(("file:", "/")) else root
        for root in allowed_roots
    ]
    return _is_under(real, local_roots)


def _quoted(uri: str) -> str:
    return urllib.parse.quote(uri, safe="/:%@?=&+,;~")


def _is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
