"""Leaves out what keeps Pillow from opening a PNG whose pixels are fine.

Browsers and libpng ignore an ancillary chunk that they cannot use. Pillow refuses the whole file,
for a wrong checksum, a wrong length, or a text or profile of more than 1 MB.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_is_kind = re.compile(rb"[A-Za-z]{4}").fullmatch

# Pillow finds the orientation in these texts if there is no eXIf chunk.
_TEXTS_OF_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")

_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types
_MAX_CHUNKS = 100_000  # pixels are usually written in chunks of 8 KB or more


class _Chunk(NamedTuple):
    kind: bytes
    file: memoryview  # length, kind, content and checksum

    @property
    def content(self) -> bytes:
        return bytes(self.file[8:-4])

    @property
    def is_intact(self) -> bool:
        return zlib.crc32(self.file[4:-4]) == int.from_bytes(self.file[-4:], "big")


def without_ancillary_chunks(data: bytes) -> Iterator[bytes]:
    """Yields smaller PNGs with the same pixels: with texts that have the orientation, and without.

    Critical chunks are kept as they are, so that Pillow judges them. What follows ``IEND`` is
    dropped, and so are ancillary chunks, except those that matter for pixels and that libpng would
    use: transparency, the significant bits and EXIF.
    """
    chunks, rest = _chunks(data)
    if not chunks or len(chunks) == _MAX_CHUNKS:  # a list of more would be larger than the file
        return
    earlier = data
    for texts in (_TEXTS_OF_ORIENTATION, ()):
        kept = b"".join([_SIGNATURE, *_needed(chunks, texts), rest])
        if kept != earlier:
            yield kept
        earlier = kept


def _chunks(data: bytes) -> tuple[list[_Chunk], memoryview]:
    """Returns the chunks up to ``IEND``; without one, also the bytes at the end that are none."""
    view, start = memoryview(data), len(_SIGNATURE)
    chunks: list[_Chunk] = []
    while len(chunks) < _MAX_CHUNKS and _is_kind(kind := data[start + 4 : start + 8]):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunks.append(_Chunk(kind, view[start:end]))
        if kind == b"IEND":
            return chunks, view[:0]
        start = end
    return chunks, view[start:]


def _needed(chunks: Sequence[_Chunk], texts: tuple[bytes, ...]) -> Iterator[memoryview]:
    transparency = _transparency(chunks)
    for chunk in chunks:
        is_critical = chunk.kind[:1].isupper()
        is_wanted = chunk.kind in (b"eXIf", b"sBIT") or (
            chunk.kind in (b"tEXt", b"zTXt", b"iTXt") and chunk.content.startswith(texts)
        )
        if is_critical or chunk is transparency or (is_wanted and chunk.is_intact):
            yield chunk.file


def _transparency(chunks: Sequence[_Chunk]) -> _Chunk | None:
    """Returns the ``tRNS`` chunk that libpng uses: the first that is valid, before the pixels."""
    colour, num_colours = -1, 0
    for chunk in chunks:
        if chunk.kind == b"IDAT":
            break
        if chunk.kind == b"IHDR":
            colour = int.from_bytes(chunk.content[9:10], "big")
        elif chunk.kind == b"PLTE":
            num_colours = len(chunk.content) // 3
        elif chunk.kind == b"tRNS" and chunk.is_intact:
            lengths = {_GREY: [2], _RGB: [6], _PALETTE: range(1, num_colours + 1)}
            if len(chunk.content) in lengths.get(colour, ()):
                return chunk
    return None
