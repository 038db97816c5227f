"""Reads the bytes of paths and URIs ahead of the decoder.

A file that does not exist is a bad image. If a file cannot be read for any other reason, the read
is retried and finally fails the task. A null therefore always means that reading again would also
return a null. The first bytes of a file decide whether the rest is read.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator, Sequence

from imagevec.errors import ImageError
from imagevec.images.formats import (
    HEAD_BYTES,
    NAMING_BYTES,
    check_bytes,
    check_format,
    is_accepted,
)
from imagevec.images.parallel import map_ahead
from imagevec.images.values import Value
from imagevec.options import DEFAULTS
from imagevec.storage.location import (
    ForbiddenError,
    Location,
    UnsupportedURIError,
    check_allowed,
    resolve_roots,
)
from imagevec.storage.retry import retried
from imagevec.storage.stores import Stream, store_of

_READ_THREADS = 8
_MAX_READ_AHEAD = 16  # files kept in memory before they are decoded
_PART_BYTES = 32 << 20
_MAX_BYTES_AHEAD = 32 << 20  # of a file; longer ones are read when they are needed


def read_ahead(
    values: Iterable[Value],
    allowed_roots: Sequence[str] = (),
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
    formats: Sequence[str] = DEFAULTS["formats"],
    max_bytes: int = DEFAULTS["max_bytes"],
) -> Iterator[Value]:
    """Yields the values in order, with each path replaced by the file's bytes or by an error.

    Several files are read concurrently in threads, so that slow storage overlaps decoding and the
    forward pass. Large files are read one at a time, so that few are in memory. The other arguments
    and the exceptions are those of ``read``.
    """
    roots = resolve_roots(allowed_roots)
    read_path = functools.partial(
        _read, roots=roots, timeout_seconds=timeout_seconds, formats=formats, max_bytes=max_bytes
    )
    read_if_small = functools.partial(read_path, most_bytes=_MAX_BYTES_AHEAD)
    read_value = functools.partial(_read_or_error, read_path=read_if_small)
    for value in map_ahead(read_value, values, _READ_THREADS, _MAX_READ_AHEAD, is_slow=_is_path):
        yield _read_or_error(value, read_path)


def _is_path(value: Value) -> bool:
    return isinstance(value.data, str)


def _read_or_error(value: Value, read_path: functools.partial[bytes | None]) -> Value:
    """Returns the value with its bytes or an error, or as it is if its file is not read."""
    if not isinstance(value.data, str):
        return value
    try:
        data = read_path(value.data)
    except ImageError as error:
        return value._replace(data=error.with_traceback(None))  # whose frames have what was read
    return value if data is None else value._replace(data=data)


def read(
    path: str,
    allowed_roots: Sequence[str] = (),
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
    formats: Sequence[str] = DEFAULTS["formats"],
    max_bytes: int = DEFAULTS["max_bytes"],
) -> bytes:
    """Reads an image file.

    Args:
        path: A local path, or a URI with a scheme that ``stores`` supports. Relative paths start
            from the worker's folder.
        allowed_roots: Folders and URI prefixes (``"s3://bucket/photos"``, ``"s3://"``) under which
            the file must be; if empty, any file may be read. Symbolic links, ``..`` and redirects
            are resolved before this check, and a link that is swapped afterwards is not followed.
        timeout_seconds: The time after which a failed read is no longer retried. The pause between
            attempts roughly doubles each time.
        formats: The accepted formats, by which the first bytes are judged.
        max_bytes: The maximum length of the file.

    Raises:
        ImageError: ``forbidden_path``, or ``unreadable_path``, which a retry would not change.
            ``empty``, ``unsupported_format`` or ``too_large``, before the file is read.
        ReadError: The read failed for another reason.
    """
    data = _read(path, resolve_roots(allowed_roots), timeout_seconds, formats, max_bytes)
    assert data is not None  # without ``most_bytes``
    return data


def _read(
    path: str,
    roots: tuple[Location, ...],
    timeout_seconds: float,
    formats: Sequence[str],
    max_bytes: int,
    most_bytes: int | None = None,
) -> bytes | None:
    """Reads a file like ``read``, or returns ``None`` if it is longer than ``most_bytes``."""
    location = Location.parse(path)

    def read_once() -> bytes | ImageError | None:  # returned, so that it is not retried
        with store_of(location).stream(location, roots) as stream:
            try:
                return _image_bytes(stream, formats, max_bytes, most_bytes)
            except ImageError as error:
                return error

    try:
        if not location.is_local:  # the store checks local paths, after resolving links
            check_allowed(location, roots)
        data = retried(location, read_once, timeout_seconds)
    except ForbiddenError as error:
        raise ImageError("forbidden_path", f"{path} is not under any of allowed_roots") from error
    except (UnsupportedURIError, OSError, ValueError) as error:
        raise ImageError("unreadable_path", f"{path}: {error}") from error
    if isinstance(data, ImageError):
        raise data
    return data


def _image_bytes(
    stream: Stream, formats: Sequence[str], max_bytes: int, most_bytes: int | None
) -> bytes | None:
    """Reads a file if its head is that of an accepted format, and unless it is too long."""
    head = _read_up_to(stream, HEAD_BYTES)
    if not is_accepted(head, formats):
        head += _read_up_to(stream, NAMING_BYTES)
        check_format(head, formats)
    if stream.length is not None:
        check_bytes(stream.length, max_bytes)
        if most_bytes is not None and stream.length > most_bytes:
            return None
    file = io.BytesIO()  # joined parts would take twice the memory
    file.write(head)
    while part := stream.read(_PART_BYTES):
        file.write(part)
        check_bytes(file.tell(), max_bytes)
        if most_bytes is not None and file.tell() > most_bytes:
            return None
    return file.getvalue()


def _read_up_to(stream: Stream, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (part := stream.read(num_bytes - len(data))):
        data += part
    return data
