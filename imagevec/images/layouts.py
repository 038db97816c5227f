"""Tells valid images of a layout that no decoder accepts from files that are cut or broken."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from imagevec.errors import ImageError
from imagevec.images.formats import BY_NAME, Format, in_words

# TIFF 6.0, section 8 and later extensions
_NEW_SUBFILE_TYPE, _BITS, _COMPRESSION, _PHOTOMETRIC, _MAKE = 254, 258, 259, 262, 271
_WIDTH, _LENGTH, _STRIPS, _SAMPLES, _COLOUR_MAP, _TILES = 256, 257, 273, 277, 320, 324
_PLANAR, _SUB_IFDS, _SAMPLE_FORMAT, _DNG_VERSION = 284, 330, 339, 50706
_STRIP_BYTES, _TILE_BYTES, _JPEG_TABLES = 279, 325, 347
_CAMERA_PHOTOMETRICS = (32803, 34892)  # colour filter array, linear raw
_WEBP_IN_TIFF = 50001  # Pillow's libtiff is built without it
_COMPRESSIONS = {
    6: "old JPEG",
    9: "JBIG",
    10: "JBIG",
    32766: "NeXT",
    32809: "ThunderScan",
    32908: "PIXAR",
    32909: "PIXAR",
    33003: "JPEG 2000",
    33004: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34676: "LogLuv",
    34677: "LogLuv",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    _WEBP_IN_TIFF: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_PHOTOMETRICS = {
    0: "grey",
    1: "grey",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "Lab",
    9: "ICC Lab",
    10: "ITU Lab",
    32803: "colour filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw",
}
_SAMPLE_FORMATS = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex float "}


def check_layout(data: bytes, name: str) -> None:
    """Checks what a decoder would get wrong, or take minutes for, before it opens the file.

    - A camera's raw file is a TIFF whose first image is a thumbnail, and would be decoded as that.
    - Pillow's libtiff lacks a compression.
    - Pillow reads the headers of JPEGs and GIFs byte by byte, and copies what it has of an EXIF
      block for each further part of it.

    Raises:
        ImageError: ``unsupported_format``, or ``corrupt`` if there is no image in sight.
    """
    if name in _CHECKS:
        _CHECKS[name](data)


def refused(data: bytes, name: str, reason: str = "", opened: bool = False) -> ImageError:
    """Returns the error of a file that the decoder of its format refused.

    It is ``unsupported_format`` with the layout in words if the file is valid, as far as its header
    tells, ``truncated`` if the header says that the file is longer, else ``corrupt``.

    Args:
        data: The whole file.
        name: The name of its format.
        reason: What the decoder said.
        opened: Whether the decoder accepted the header.
    """
    if "truncated" in reason.lower():
        return ImageError("truncated", reason)
    if name == "JPEG" or (name in _LAYOUTS and not opened):  # JPEGs are opened whatever their kind
        layout = _LAYOUTS[name](data)
        if layout is not None:
            return ImageError("unsupported_format", layout)
    if len(data) < _LENGTHS[name](data):
        return ImageError("truncated", reason or f"{name} that ends before its header does")
    return ImageError("corrupt", reason or f"{name} with a broken header")


_Tags = Mapping[int, tuple[int, ...]]  # text is a tuple of bytes


def _raw_format(tags: _Tags) -> Format | None:
    """Returns the format of a camera's raw file by the tags of its first directory, or ``None``.

    DNG has a tag of its own (Adobe, DNG 1.7). In others the first image is reduced, and the raw
    data in a further directory; or the first image is the raw data.
    """
    if _DNG_VERSION in tags:
        return BY_NAME["DNG"]
    is_reduced = _SUB_IFDS in tags and tags.get(_NEW_SUBFILE_TYPE, (0,))[0] & 1
    if is_reduced or tags.get(_PHOTOMETRIC, (0,))[0] in _CAMERA_PHOTOMETRICS:
        make = bytes(tags.get(_MAKE, ())).upper()
        return BY_NAME["NEF" if b"NIKON" in make else "ARW" if b"SONY" in make else "RAW"]
    return None


def _check_tiff(data: bytes) -> None:
    tags = _tiff_tags(data)
    if (raw := _raw_format(tags)) is not None:
        raise ImageError("unsupported_format", in_words(raw))
    if tags.get(_COMPRESSION, (1,))[0] == _WEBP_IN_TIFF:
        raise ImageError("unsupported_format", _compression_in_words(_WEBP_IN_TIFF))


def _tiff_tags(data: bytes) -> _Tags:
    """Returns the tags of the first directory that tell its layout, as far as they are readable.

    Raises:
        ImageError: ``unsupported_format``: the directory is too long.
    """
    order = _byte_order(data)
    tags: dict[int, tuple[int, ...]] = {}
    try:
        for entry in _tiff_entries(data):
            if entry.tag not in _LAYOUT_TAGS or entry.tag in tags or entry.length < 1:
                continue
            if entry.length > _MAX_STRIPS:
                detail = f"TIFF with {entry.length} values of tag {entry.tag}"
                raise ImageError("unsupported_format", detail)
            values = f"{order}{min(entry.length, _MAX_VALUES)}{entry.type}"
            tags[entry.tag] = struct.unpack_from(values, data, entry.start)
    except (struct.error, OverflowError):  # the file ends, or an offset is impossible
        pass
    return tags


def _byte_order(data: bytes) -> str:
    """Returns the byte order of a TIFF, as in ``struct``."""
    return "<" if data[:1] == b"I" else ">"


class _TiffEntry(NamedTuple):
    tag: int
    type: str  # of one value, as in struct
    length: int  # number of values
    start: int
    end: int


def _tiff_entries(data: bytes) -> Iterator[_TiffEntry]:
    """Yields the entries of the first directory whose values are integers or bytes.

    Raises:
        ImageError: ``unsupported_format``: the directory is too long.
        struct.error: The file ends in the directory.
        OverflowError: The offset of the directory is impossible.
    """
    order = _byte_order(data)
    number, count_type, inline = ("Q", "Q", 8) if b"+" in data[2:4] else ("I", "H", 4)
    head = struct.Struct(f"{order}HH{number}")
    (start,) = struct.unpack_from(order + number, data, inline)
    (count,) = struct.unpack_from(order + count_type, data, start)
    start += struct.calcsize(order + count_type)
    if count > _MAX_TAGS:
        raise ImageError("unsupported_format", f"TIFF with {count} tags")
    for _ in range(count):
        tag, kind, length = head.unpack_from(data, start)
        place = start + head.size
        start = place + inline
        if start > len(data):
            raise struct.error("the file ends in an entry")
        if kind in _TIFF_TYPES:
            size = length * struct.calcsize(order + _TIFF_TYPES[kind])
            if size > inline:
                (place,) = struct.unpack_from(order + number, data, place)
            yield _TiffEntry(tag, _TIFF_TYPES[kind], length, place, place + size)


_LAYOUT_TAGS = {
    *(_NEW_SUBFILE_TYPE, _BITS, _COMPRESSION, _PHOTOMETRIC, _MAKE, _WIDTH, _LENGTH, _STRIPS),
    *(_SAMPLES, _STRIP_BYTES, _PLANAR, _COLOUR_MAP, _TILES, _TILE_BYTES, _SUB_IFDS),
    *(_SAMPLE_FORMAT, _DNG_VERSION),
}
_PLACES_OF_PIXELS = {_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES}
_TIFF_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q", 18: "Q"}
_MAX_VALUES = 16
_MAX_TAGS = 65_535  # of a BigTIFF: others cannot have more
_MAX_STRIPS = 200_000  # Pillow has an object for each, which takes 17 microseconds


def _tiff_layout(data: bytes) -> str | None:
    """Returns the layout of a TIFF that Pillow does not open in words; ``None`` if it is broken."""
    tags = _tiff_tags(data)
    (width, *_), (length, *_) = tags.get(_WIDTH, (0,)), tags.get(_LENGTH, (0,))
    (samples, *_), (photometric, *_) = tags.get(_SAMPLES, (1,)), tags.get(_PHOTOMETRIC, (0,))
    compression, bits = tags.get(_COMPRESSION, (1,))[0], tags.get(_BITS, (1,))
    is_whole = (_STRIPS in tags or _TILES in tags) and (photometric != 3 or _COLOUR_MAP in tags)
    if min(width, length, samples, *bits) < 1 or max(bits) > 128 or not is_whole:
        return None
    if len(data) < _end_of_tiff_tags(data):
        return None
    if compression in _COMPRESSIONS:
        return _compression_in_words(compression)
    kind = _SAMPLE_FORMATS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
    depth = str(bits[0]) if len(set(bits)) == 1 else "/".join(map(str, bits))
    colours = _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    planar = ", planar" if samples > 1 and tags.get(_PLANAR, (1,))[0] == 2 else ""
    return f"TIFF, {samples} x {depth} bit {kind}{colours}{planar}"


def _compression_in_words(compression: int) -> str:
    return f"TIFF, {_COMPRESSIONS[compression]} compression"


_LOSSLESS, _HIERARCHICAL, _LOSSLESS_ARITHMETIC, _JPEG_LS = 0xC3, (5, 6, 7, 13, 14, 15), 0xCB, 0xF7


def _jpeg_layout(data: bytes) -> str | None:
    """Returns the kind of a JPEG in words if libjpeg does not decode it."""
    for marker, start in _jpeg_segments(data):
        if marker == _JPEG_LS:
            return "JPEG-LS"
        if marker in _FRAMES:
            if len(data) < start + 8:
                return None
            bits, components = data[start + 2], data[start + 7]
            if marker - 0xC0 in _HIERARCHICAL:
                return "hierarchical JPEG"
            if marker == _LOSSLESS_ARITHMETIC:
                return "lossless JPEG with arithmetic coding"
            if bits in range(2, 17) and bits != 8:
                return f"{bits}-bit {'lossless ' if marker == _LOSSLESS else ''}JPEG"
            return None if components in (0, 1, 3, 4) else f"JPEG, {components} components"
    return None


def check_scans(data: bytes, num_pixels: int) -> None:
    """Checks that a JPEG has few scans: a few bytes of a scan make libjpeg visit every pixel.

    Raises:
        ImageError: ``unsupported_format``.
    """
    if len(data) * num_pixels < _QUICK:
        return
    segments = list(_jpeg_segments(data))
    start = segments[-1][1] if segments else 0
    frame = next((kind for kind, _ in segments if kind in _FRAMES), 0)
    has_one_scan = frame in _BASELINE_FRAMES and data[start + 2 : start + 3] in (b"\3", b"\4")
    if not has_one_scan and len([*islice(_SCAN.finditer(data, start), _MAX_SCANS)]) == _MAX_SCANS:
        raise ImageError("unsupported_format", f"JPEG of more than {_MAX_SCANS} scans")


def _check_jpeg(data: bytes) -> None:
    if len(data) <= _SMALL_JPEG:
        return
    segments = list(_jpeg_segments(data))
    exif = sum(kind == 0xE1 and data.startswith(b"Exif\0\0", start + 2) for kind, start in segments)
    if exif > _MAX_PARTS_OF_EXIF or len(segments) == _MAX_SEGMENTS:
        detail = f"JPEG with {len(segments)} segments before its pixels, {exif} of them EXIF"
        raise ImageError("unsupported_format", detail)
    kind, start = segments[-1] if segments else (0, 2)
    if kind != _START_OF_SCAN and len(data) - start > _MAX_JUNK:
        raise ImageError("corrupt", "JPEG without a scan")


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BASELINE_FRAMES = (0xC0, 0xC1)
_ARITHMETIC_FRAMES = (0xC9, 0xCA)
_START_OF_SCAN = 0xDA
_SCAN = re.compile(b"\xff\xda")  # in the pixels, 0 follows every other 0xFF
_MAX_SCANS = 100  # programs that optimise scans write less than 30
_QUICK = 2e10  # bytes x pixels: in 10 bytes a scan, and half a nanosecond a pixel, one second
_SMALL_JPEG = 1 << 20  # in bytes, whose header takes less than a second, whatever it is
_MAX_SEGMENTS = 10_000
_MAX_PARTS_OF_EXIF = 100  # of 64 KB each
_MAX_JUNK = 1 << 16  # bytes between segments


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the marker and the start of each segment before the first scan (T.81, annex B).

    As in libjpeg, there may be other bytes between them. The last may begin where the file ends.
    """
    position = 2
    for _ in range(_MAX_SEGMENTS):
        position = data.find(b"\xff", position, position + _MAX_JUNK)
        fill = _FILL.match(data, position, position + _MAX_JUNK) if position >= 0 else None
        if fill is None:
            return
        marker, start = data[fill.end() : fill.end() + 1], fill.end() + 1
        if marker == b"\xff":  # more of them
            return
        yield marker[0] if marker else 0, start
        if marker in (b"", b"\xda"):
            return
        position = start + _segment_bytes(data, start)


_FILL = re.compile(b"\xff+")


def _segment_bytes(data: bytes, start: int) -> int:
    return max(2, int.from_bytes(data[start : start + 2], "big"))


def _bmp_layout(data: bytes) -> str | None:
    """Returns the kind of a BMP in words if Pillow does not decode it."""
    if len(data) < 14 + 20:
        return None
    size, _, _, _, bits, compression = struct.unpack_from("<IiiHHI", data, 14)
    if size not in (12, *range(16, 65, 4), 108, 124) or size == 12:
        return None
    kinds = (
        {4: "RLE24", 3: "Huffman coding"} if size == 64 else {4: "a JPEG inside", 5: "a PNG inside"}
    )
    if compression in kinds:
        return f"BMP, {kinds[compression]}"
    if compression == 3:
        return f"BMP, {bits} bit with other masks than usual"
    if bits in (2, 64):
        return f"BMP, {bits} bit"
    return f"BMP, header of {size} bytes" if size not in (40, 52, 56, 64, 108, 124) else None


def _length_of_webp(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _length_of_boxes(data: bytes) -> int:
    """Returns the end of the last box that begins in the file (ISO/IEC 14496-12, section 4.2).

    It is beyond the file if the box with the coded image is missing.
    """
    position, kinds = 0, set()
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kinds.add(data[position + 4 : position + 8])
        if size == 1:  # the size follows
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:  # 0: to the end of the file
            return position + 8
        position += size
    return position if kinds & {b"mdat", b"idat", b"jp2c"} else len(data) + 1


def _check_gif(data: bytes) -> None:
    """Checks that an image follows the extensions, as Pillow searches for one byte by byte."""
    end = _length_of_gif(data)
    if len(data) - end > _MAX_JUNK and data[end - 10 : end - 9] != b",":
        raise ImageError("corrupt", "GIF without an image")


def _length_of_gif(data: bytes) -> int:
    """Returns the end of the first image descriptor (GIF89a, sections 17 to 25)."""
    flags = int.from_bytes(data[10:11])
    position = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    num_blocks = 0
    while data[position : position + 1] == b"!" and num_blocks < _MAX_GIF_BLOCKS:
        position += 2
        while (
            size := int.from_bytes(data[position : position + 1])
        ) and num_blocks < _MAX_GIF_BLOCKS:
            position += 1 + size
            num_blocks += 1
        num_blocks += 1
        position += 1
    return position + 10


_MAX_GIF_BLOCKS = 1_000_000  # of 255 bytes at most


def _length_of_tiff(data: bytes) -> int:
    """Returns the end of the last strip or tile, or of what comes before the pixels."""
    end = _end_of_tiff_tags(data)
    if end > len(data):
        return end
    places: dict[int, tuple[int, ...]] = {}
    for entry in _tiff_entries(data):
        if entry.tag in _PLACES_OF_PIXELS and entry.tag not in places:
            values = f"{_byte_order(data)}{entry.length}{entry.type}"
            places[entry.tag] = struct.unpack_from(values, data, entry.start)
    offsets = places.get(_STRIPS) or places.get(_TILES) or ()
    lengths = places.get(_STRIP_BYTES) or places.get(_TILE_BYTES) or ()
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=False)]
    return max([end, *ends])


def _end_of_tiff_tags(data: bytes) -> int:
    """Returns the end of the first directory, or of those of its values that decoding needs."""
    ends = [0]
    try:
        for entry in _tiff_entries(data):
            if entry.tag in _LAYOUT_TAGS or entry.tag == _JPEG_TABLES:
                ends.append(entry.end)
    except (struct.error, OverflowError):
        return len(data) + 1
    return max(ends)


def _length_of_icon(data: bytes) -> int:
    """Returns the end of the last image."""
    count = int.from_bytes(data[4:6], "little")
    entries = [data[position : position + 16] for position in range(6, 6 + 16 * count, 16)]
    ends: list[int] = [
        sum(struct.unpack("<II", entry[8:])) for entry in entries if len(entry) == 16
    ]
    return max([6 + 16 * count, *ends])


def _length_of_jpeg(data: bytes) -> int:
    """Returns the end of the last segment before the first scan, and of the scan's marker.

    It is beyond the file if arithmetic-coded data have no end: libjpeg cannot wait for more of
    them, and reports another error.
    """
    end, is_arithmetic = 4, False
    for marker, start in _jpeg_segments(data):
        end = start + 2 if marker == 0 else start + _segment_bytes(data, start)
        is_arithmetic |= marker in _ARITHMETIC_FRAMES
    return len(data) + 1 if is_arithmetic and data.find(b"\xff\xd9", end) < 0 else end


# The least length of a file, as far as its header says.
_LENGTHS: Mapping[str, Callable[[bytes], int]] = {
    "JPEG": _length_of_jpeg,
    "PNG": lambda data: 33,  # with IHDR
    "WEBP": _length_of_webp,
    "GIF": _length_of_gif,
    "BMP": lambda data: 14 + min(124, int.from_bytes(data[14:18], "little")),
    "TIFF": _length_of_tiff,
    "AVIF": _length_of_boxes,
    "HEIF": _length_of_boxes,
    "JPEG2000": _length_of_boxes,
    "ICO": _length_of_icon,
}

_CHECKS: Mapping[str, Callable[[bytes], None]] = {
    "JPEG": _check_jpeg,
    "TIFF": _check_tiff,
    "GIF": _check_gif,
}

_LAYOUTS: Mapping[str, Callable[[bytes], str | None]] = {
    "JPEG": _jpeg_layout,
    "TIFF": _tiff_layout,
    "BMP": _bmp_layout,
}
