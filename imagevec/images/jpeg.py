"""Decodes plain JPEGs, and ends JPEGs that lack their end.

Sections are those of ITU-T T.81.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from imagevec.images.pixels import Pixels

SIGNATURE = b"\xff\xd8\xff"

_END = b"\xff\xd9"
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # of all coding processes
_HUFFMAN_CODED = (0xC0, 0xC1, 0xC2)

_ENDS_EARLY = "premature end of data segment"  # libjpeg's words for a scan

# Entropy-coded data contain FF 00 and restart markers, and FF FF is padding (B.1.1). The marker 01
# and that of the start of an image have no length.
_next_marker = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL).search


def decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Returns uint8 RGB ``(H, W, 3)`` faster than Pillow, or ``None`` to leave errors to Pillow.

    Both use libjpeg-turbo with the same settings, so the pixels are equal at every scale. The
    default ``strict`` mode rejects every file with a libjpeg warning, and Pillow then decides.
    """
    width, height = image.size  # after ``draft``, of the scaled image
    try:
        return _strictly_decoded(data, "RGB", width, height)
    except ValueError:
        return None


def _strictly_decoded(data: bytes, colours: str, width: int = 0, height: int = 0) -> Pixels:
    """Decodes a JPEG about which libjpeg has no warning.

    Raises:
        ValueError: libjpeg has a warning or an error.
        MemoryError: The worker has too little memory.
    """
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
    except ValueError as error:
        if "Insufficient memory" in str(error):  # libjpeg's words
            raise MemoryError(str(error)) from error
        raise
    return pixels


def with_end(data: bytes) -> bytes | None:
    """Returns a JPEG that lacks only its end marker with that marker, if all its pixels are there.

    In place of the marker, a file may have zeros, one or two other bytes, or nothing. If libjpeg
    has no warning then, no bit of any scan is missing.
    """
    segments, _ = _segments(data)
    kinds = [segment.kind for segment in segments]
    if _END_OF_IMAGE in kinds or not _has_all_scans(segments):
        return None
    for length in _lengths_before_end(data):
        candidate = data[:length] + _END
        try:
            if _is_complete(candidate, _colours(segments)):
                return candidate
        except ValueError as error:
            if _ENDS_EARLY in str(error):  # and so does a shorter file
                return None
    return None


def up_to_cut(data: bytes) -> bytes | None:
    """Returns a truncated JPEG with an end marker after its last complete segment or its pixels.

    libjpeg then decodes what is there. ``None`` if no pixel is there.
    """
    segments, end = _segments(data)
    kinds = [segment.kind for segment in segments]
    if _END_OF_IMAGE in kinds or not _has_a_pixel(data, segments, end):
        return None
    return data[:end] + _END


class _Segment(NamedTuple):
    kind: int  # the second byte of the marker
    start: int  # of the content, after the length
    content: bytes


def _segments(data: bytes) -> tuple[list[_Segment], int]:
    """Returns the segments (B.1.1.4), and where they end.

    They end with the end marker, before a segment that is incomplete, or with the file.
    """
    segments: list[_Segment] = []
    start = 0
    while marker := _next_marker(data, start):
        kind, begin = marker[1][0], marker.end()
        start = begin + int.from_bytes(data[begin : begin + 2], "big")
        if kind == _END_OF_IMAGE:
            return [*segments, _Segment(kind, begin, b"")], begin
        if not begin + 2 <= start <= len(data):
            return segments, marker.start()
        segments.append(_Segment(kind, begin + 2, data[begin + 2 : start]))
    return segments, len(data)


def _colours(segments: list[_Segment]) -> str:
    """Returns the colours in which libjpeg decodes a JPEG, by its frame (B.2.2)."""
    frames = [segment.content for segment in segments if segment.kind in _FRAMES]
    return "CMYK" if frames and frames[0][5:6] == b"\4" else "RGB"


def _has_all_scans(segments: list[_Segment]) -> bool:
    """Returns whether the scans have all bits of all coefficients of all components (G.1.1.1).

    libjpeg does not miss a scan. A frame that is not coded by Huffman's method lacks something,
    because libjpeg does not notice either if its scans end early.
    """
    lowest_bits = np.full((256, 64), -1)  # of each coefficient of a component; -1: none
    components = b""
    for kind, _, content in segments:
        if kind in _FRAMES:
            if kind not in _HUFFMAN_CODED:
                return False
            components = content[6::3]
        elif kind == _START_OF_SCAN and content:
            scan, parameters = content[1 : 1 + 2 * content[0] : 2], content[1 + 2 * content[0] :]
            if len(parameters) == 3:
                first, last, bits = parameters
                lowest_bits[list(scan), first : last + 1] = bits & 0xF
    return bool(components) and not lowest_bits[list(components)].any()


def _has_a_pixel(data: bytes, segments: list[_Segment], end: int) -> bool:
    """Returns whether the first pixel is there: the first scan of a JPEG of 1x1 pixels.

    libjpeg fills the blocks that a scan lacks with grey, and the one at the cut with zero bits.
    """
    frame = next((segment for segment in segments if segment.kind in _FRAMES), None)
    scans = [number for number, segment in enumerate(segments) if segment.kind == _START_OF_SCAN]
    if frame is None or not scans:
        return False
    after = segments[scans[0] + 1 :]
    end = after[0].start - 4 if after else end
    size = frame.start + 1  # after the precision
    pixel = data[:size] + b"\0\1\0\1" + data[size + 4 : end] + _END
    try:
        _strictly_decoded(pixel, _colours(segments))
    except ValueError as error:
        return _ENDS_EARLY not in str(error)
    return True


def _lengths_before_end(data: bytes) -> list[int]:
    """Returns where the entropy-coded data may end, the longest first."""
    stripped = data.rstrip(b"\0")
    lengths = {len(data), len(data) - 1, len(data) - 2, len(stripped)}
    if stripped.endswith(b"\xff"):
        lengths.add(min(len(stripped) + 1, len(data)))  # FF 00 stands for the byte FF (B.1.1.5)
    return sorted(lengths, reverse=True)


def _is_complete(data: bytes, colours: str) -> bool:
    """Returns whether a JPEG decodes without a warning, and needs its last byte if that is zero.

    Zeros at the end may stand for lost bytes, and may decode to something. If they are the file's
    own, they have no padding, which consists of ones (F.1.2.3).

    Raises:
        ValueError: libjpeg has a warning.
    """
    pixels = _strictly_decoded(data, colours)
    if data[-3] != 0 or data[-4] == 0xFF:
        return True
    try:
        other = _strictly_decoded(data[:-3] + b"\x01" + _END, colours)
    except ValueError:
        return True
    return not np.array_equal(pixels, other)
