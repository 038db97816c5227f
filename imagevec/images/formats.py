"""Judges files by their first bytes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from imagevec.errors import ImageError

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
}


def check_head(head: bytes, formats: Sequence[str]) -> None:
    """Checks that a file may be an image, as Pillow does before it opens one.

    Args:
        head: The first 16 bytes or more, or the whole file.
        formats: The accepted formats, from ``imagevec.options.FORMATS``.

    Raises:
        ImageError: ``empty``, or what ``unidentified`` returns.
    """
    if not head:
        raise ImageError("empty", "0 bytes")
    Image.preinit()  # the common formats
    if not _is_accepted(head, formats):
        Image.init()
        if not _is_accepted(head, formats):
            raise unidentified(head, formats)


def check_bytes(length: int, max_bytes: int) -> None:
    """Raises ``ImageError`` if a file has more than ``max_bytes`` bytes."""
    if length > max_bytes:
        raise ImageError("too_large", f"{length} bytes, max_bytes={max_bytes}")


def unidentified(data: bytes, formats: Sequence[str]) -> ImageError:
    """Returns the error of a file that Pillow does not open as any of the formats."""
    found = next((name for magic, name in _SIGNATURES.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = "WEBP"
    elif data[4:12] in (b"ftypavif", b"ftypavis"):
        found = "AVIF"
    if found in formats:
        return ImageError("corrupt", f"{found} with a broken header")
    return ImageError("unsupported_format", found or f"starts with {data[:8]!r}")


def _is_accepted(head: bytes, formats: Sequence[str]) -> bool:
    """Returns whether a loaded decoder accepts the file. One that cannot run returns a string."""
    accepts = [Image.OPEN[name][1] for name in formats if name in Image.OPEN]
    return any(accept is None or accept(head[:16]) is True for accept in accepts)
