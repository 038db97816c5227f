"""Reads the structure of HEIF files, to judge them before libheif decodes anything.

libheif cannot be given ``max_pixels``, and it leaves tiles black that it cannot read. So each part
of the primary image must be complete, of HEVC and small enough. Sections are those of ISO/IEC
14496-12:2022 (boxes) and 23008-12:2022 (images).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from imagevec.errors import ImageError

# One coded image may have more pixels than is shown of it, and all parts of an image may have more
# than the image: tiles reach over its edges, alpha doubles them. Factors of max_pixels, or of
# _SMALL_PIXELS where that is more.
_MAX_CODED = 2
_MAX_TOTAL = 8
_SMALL_PIXELS = 1 << 20
_LEAST_PIXELS = 64 * 64  # which a part counts at least, for its decoder takes time to start

# Of files that people have, none comes near these. libheif has similar limits.
_MAX_BOXES = 10_000  # in a box
_MAX_ITEMS = 1000
_MAX_EXTENTS = 32
_MAX_REFERENCES = 100_000
_MAX_DEPTH = 8

_HEVC = b"hvc1"
_METADATA = (b"Exif", b"mime")  # mime: XMP
_DERIVED = (b"grid", b"iden", b"iovl")  # made of other images (23008-12, section 6.6.2)
_CODECS = {
    b"av01": "AV1",
    b"avc1": "AVC",
    b"j2k1": "JPEG 2000",
    b"jpeg": "JPEG",
    b"unci": "uncompressed",
    b"vvc1": "VVC",
}
_ALPHA = (
    b"urn:mpeg:avc:2015:auxid:1",
    b"urn:mpeg:hevc:2015:auxid:1",
    b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha",
)


class Property(NamedTuple):
    """A property of images: its type, where its content begins, and what is in it."""

    kind: bytes
    start: int
    content: bytes = b""
    size: tuple[int, int] = (0, 0)


_IN_IDAT = 1  # how an extent is found


@dataclass
class Items:
    """What is needed to know of the items of a file, by their numbers.

    Attributes:
        primary: The number of the primary image.
        kinds: The types, such as ``hvc1`` or ``grid``.
        kind_starts: Where these are in the file.
        sizes: The sizes of images before transformations.
        steps: The transformations of images, in order.
        pixels: The pixels of images, as coded or cropped, whichever is more.
        extents: Where the data of an item are: offset and length.
        parts: The images that an image is made of, each as often as it is used.
        auxiliaries: Further images that belong to an image.
        alphas: The auxiliary images that are the alpha of others.
        idat: The box of data that extents may refer to.
        is_short: Whether the file ends before one of its boxes.
    """

    primary: int = 0
    kinds: dict[int, bytes] = field(default_factory=dict)
    kind_starts: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    steps: dict[int, list[Property]] = field(default_factory=dict)
    pixels: dict[int, int] = field(default_factory=dict)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    parts: dict[int, list[int]] = field(default_factory=dict)
    auxiliaries: dict[int, list[int]] = field(default_factory=dict)
    alphas: set[int] = field(default_factory=set)
    idat: _Reader | None = None
    is_short: bool = False

    def needed(self, item: int) -> list[int]:
        """Returns the items that an image is decoded from, in addition to itself."""
        alphas = [other for other in self.auxiliaries.get(item, []) if other in self.alphas]
        return self.parts.get(item, []) + alphas

    def primary_and_alpha(self) -> set[int]:
        return {self.primary, *(item for item in self.needed(self.primary) if item in self.alphas)}

    def head(self, item: int, data: bytes) -> bytes:
        """Returns the first bytes of the data of an item, 20 if there are so many."""
        extents = self.extents.get(item, [])
        return b"".join(data[start : start + min(size, 20)] for start, size in extents)[:20]

    def image(self) -> set[int]:
        """Returns the items that the primary image is decoded from, and itself."""
        found: set[int] = set()
        waiting = {self.primary}
        while waiting:
            item = waiting.pop()
            found.add(item)
            waiting |= set(self.needed(item)) - found
        return found


def check_pixels(items: Items, max_pixels: int) -> None:
    """Checks the primary image and its parts, which libheif decodes one by one.

    Raises:
        ImageError: ``unsupported_format``, ``too_large`` or ``corrupt``.
    """
    limit = max(max_pixels, _SMALL_PIXELS)
    for item in items.image():
        kind = items.kinds.get(item, b"")
        if kind != _HEVC and kind not in _DERIVED:
            codec = _CODECS.get(kind) or f"an image of type {kind!r}"
            raise ImageError("unsupported_format", f"HEIF, {codec} inside")
        if not items.pixels.get(item) or item not in items.sizes:
            raise ImageError("corrupt", "HEIF with an image without a size")
        if items.pixels[item] > _MAX_CODED * limit:
            raise _too_large(items.pixels[item], max_pixels)
    total = _total(items, items.primary, {})
    if total > _MAX_TOTAL * limit:
        raise _too_large(total, max_pixels)


def _too_large(num_pixels: int, max_pixels: int) -> ImageError:
    return ImageError("too_large", f"HEIF of {num_pixels} coded pixels, max_pixels={max_pixels}")


def _total(items: Items, item: int, totals: dict[int, int], depth: int = 0) -> int:
    """Returns how many pixels are decoded and composed, parts as often as they are used."""
    if depth > _MAX_DEPTH:
        raise ImageError("corrupt", "HEIF with an image that is a part of itself")
    if item not in totals:
        needed = items.needed(item)
        inner = sum(_total(items, part, totals, depth + 1) for part in needed)
        totals[item] = max(items.pixels.get(item, 0), _LEAST_PIXELS) + inner
    return totals[item]


def check_data(data: bytes, items: Items) -> None:
    """Checks that no coded image is missing or zeros, as in a download with holes."""
    for item in items.image():
        if items.kinds[item] == _HEVC and not any(items.head(item, data)):
            raise ImageError("corrupt", "HEIF that lacks the data of an image")


def is_cut(data: bytes, items: Items) -> bool:
    """Returns whether the file ends before the data of the primary image."""
    return any(_is_cut(data, items, item) for item in items.image())


def cut_metadata(data: bytes, items: Items) -> list[int]:
    """Returns the items of EXIF and XMP whose data the file lacks."""
    metadata = [item for item, kind in items.kinds.items() if kind in _METADATA]
    return [item for item in metadata if _is_cut(data, items, item)]


def _is_cut(data: bytes, items: Items, item: int) -> bool:
    return any(start + size > len(data) for start, size in items.extents.get(item, []))


class _Reader:
    """Reads big-endian numbers, and raises ``EOFError`` at the end of a box."""

    def __init__(self, data: bytes, start: int, end: int, is_cut: bool = False) -> None:
        self.data, self.start, self.end, self.is_cut = data, start, end, is_cut

    def take(self, size: int) -> bytes:
        start, self.start = self.start, self.start + size
        if self.start > self.end:
            raise EOFError("a box is too short")
        return self.data[start : self.start]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def uints(self, count: int, size: int) -> list[int]:
        numbers: list[int] = np.frombuffer(self.take(count * size), f">u{size}").tolist()
        return numbers

    def version(self) -> tuple[int, int]:
        """Returns the version and the flags, with which many boxes begin."""
        return self.uint(1), self.uint(3)

    def boxes(self) -> Iterator[tuple[bytes, _Reader]]:
        """Yields the type and the content of each box (14496-12, section 4.2)."""
        for _ in range(_MAX_BOXES):
            if self.start >= self.end:
                return
            box = self.start
            size, kind = self.uint(4), self.take(4)
            if size == 1:
                size = self.uint(8)
            end = box + size if size else self.end
            if end < self.start:
                raise EOFError(f"a box {kind!r} has {size} bytes")
            yield kind, _Reader(self.data, self.start, min(end, self.end), end > self.end)
            self.start = end  # beyond the end, if the last box is cut
        raise EOFError(f"more than {_MAX_BOXES} boxes in a box")


def read_items(data: bytes) -> Items:
    """Reads the boxes of items (14496-12, section 8.11).

    Raises:
        ImageError: ``truncated``, ``unsupported_format`` or ``corrupt``.
    """
    items = Items()
    meta = _meta(items, data)
    try:
        meta.version()
        boxes: dict[bytes, _Reader] = {}
        for kind, box in meta.boxes():
            boxes.setdefault(kind, box)  # libheif takes the first
        items.idat = boxes.get(b"idat")
        for kind, read in _READERS.items():
            if kind in boxes:
                read(items, boxes[kind])
        for item in items.image():
            _read_canvas(items, item, data)
    except EOFError as error:
        is_short = items.is_short or is_cut(data, items)
        raise ImageError("truncated" if is_short else "corrupt", f"HEIF: {error}") from error
    if items.primary not in items.kinds:
        raise ImageError("corrupt", "HEIF without a primary image")
    if _num_bytes(data, items) > 2 * len(data):  # libheif copies the metadata of all items
        raise ImageError("corrupt", "HEIF with items that overlap")
    return items


def _num_bytes(data: bytes, items: Items) -> int:
    """Returns the sum of the sizes of all items, as far as they are in the file."""
    extents = (extent for of_item in items.extents.values() for extent in of_item)
    return sum(max(0, min(size, len(data) - start)) for start, size in extents)


def _meta(items: Items, data: bytes) -> _Reader:
    """Returns the meta box of a file, and sets ``is_short``."""
    file = _Reader(data, 0, len(data))
    found: dict[bytes, _Reader] = {}
    try:
        for kind, box in file.boxes():
            if kind == b"meta" and kind in found:
                raise ImageError("corrupt", "HEIF with two meta boxes")
            found[kind] = box
    except EOFError:
        pass  # the file ends within the size of a box, or garbage follows
    items.is_short = file.start > len(data)
    if b"meta" in found and not found[b"meta"].is_cut:
        return found[b"meta"]
    if b"meta" not in found and b"moov" in found:
        raise ImageError("unsupported_format", "HEIF sequence without an image")
    if items.is_short:
        raise ImageError("truncated", f"HEIF that ends after {len(data)} bytes, before its images")
    raise ImageError("corrupt", "HEIF without a meta box")


def _read_primary(items: Items, box: _Reader) -> None:
    items.primary = box.uint(2 if box.version()[0] == 0 else 4)


def _read_kinds(items: Items, box: _Reader) -> None:
    box.uint(2 if box.version()[0] == 0 else 4)
    for kind, entry in box.boxes():
        version, _ = entry.version()
        if kind == b"infe" and version >= 2:  # before, items had no types
            item = entry.uint(2 if version == 2 else 4)
            entry.uint(2)  # protection
            items.kind_starts.setdefault(item, entry.start)
            items.kinds.setdefault(item, entry.take(4))


def _read_extents(items: Items, box: _Reader) -> None:
    """Reads where the data of items are (14496-12, section 8.11.3)."""
    version, _ = box.version()
    sizes = box.uint(2)
    offset_size, size_size, base_size = (sizes >> shift & 15 for shift in (12, 8, 4))
    index_size = sizes & 15 if version else 0
    for _ in range(_count(box, 2 if version < 2 else 4, _MAX_ITEMS)):
        item = box.uint(2 if version < 2 else 4)
        method = box.uint(2) & 15 if version else 0
        box.uint(2)  # the file, which is this one
        start = box.uint(base_size)
        if method == _IN_IDAT and items.idat is not None:
            start += items.idat.start
        extents = []
        for _ in range(_count(box, 2, _MAX_EXTENTS)):
            box.uint(index_size)
            extents.append((start + box.uint(offset_size), box.uint(size_size)))
        items.extents.setdefault(item, extents)


def _count(box: _Reader, size: int, limit: int) -> int:
    count = box.uint(size)
    if count > limit:
        raise EOFError(f"{count} entries in a list of {limit} at most")
    return count


def _read_references(items: Items, box: _Reader) -> None:
    size = 2 if box.version()[0] == 0 else 4
    num_references = 0
    for kind, entry in box.boxes():
        item, count = entry.uint(size), entry.uint(2)
        num_references += count
        if num_references > _MAX_REFERENCES:
            raise EOFError(f"more than {_MAX_REFERENCES} references")
        others = entry.uints(count, size)
        if kind == b"dimg":
            items.parts.setdefault(item, []).extend(others)
        elif kind == b"auxl":
            for other in others:
                items.auxiliaries.setdefault(other, []).append(item)


def _read_properties(items: Items, box: _Reader) -> None:
    """Reads sizes, transformations and which images are alpha (14496-12, section 8.11.14)."""
    properties = [Property(b"", 0)]  # they are counted from 1
    associations = []
    for kind, part in box.boxes():
        if kind == b"ipco" and len(properties) == 1:
            properties += [_property(*inner) for inner in part.boxes()]
        elif kind == b"ipma":
            associations.append(part)
    for part in associations:
        for item, numbers in _associations(part):
            for number in numbers:
                if number < len(properties):
                    _associate(items, item, properties[number])


def _property(kind: bytes, box: _Reader) -> Property:
    start = box.start
    if kind == b"ispe":
        box.version()
        return Property(kind, start, size=(box.uint(4), box.uint(4)))
    if kind == b"clap":
        content = box.take(32)
        width, height, *_ = crop_of(content)
        return Property(kind, start, content, (math.ceil(width), math.ceil(height)))
    if kind in (b"irot", b"imir"):
        return Property(kind, start, box.take(1))
    if kind == b"auxC":
        box.version()
        return Property(kind, start, box.take(box.end - box.start).partition(b"\0")[0])
    return Property(kind, start)


def _associate(items: Items, item: int, given: Property) -> None:
    if given.kind in (b"clap", b"irot", b"imir"):
        items.steps.setdefault(item, []).append(given)
    elif given.kind == b"ispe":
        items.sizes[item] = given.size
    elif given.content in _ALPHA:
        items.alphas.add(item)
    items.pixels[item] = max(items.pixels.get(item, 0), math.prod(given.size))


def crop_of(content: bytes) -> list[Fraction]:
    """Returns width, height and offset of the centre of a crop (14496-12, section 12.1.4)."""
    numbers = struct.unpack(">8i", content)
    if min(numbers[1::2]) < 1 or min(numbers[:4]) < 1:
        raise EOFError("a crop is impossible")
    return [Fraction(*numbers[at : at + 2]) for at in range(0, 8, 2)]


def _associations(box: _Reader) -> Iterator[tuple[int, list[int]]]:
    """Yields the numbers of the properties of each item."""
    version, flags = box.version()
    size, mask = (2, 0x7FFF) if flags & 1 else (1, 0x7F)  # the highest bit says: essential
    for _ in range(_count(box, 4, _MAX_ITEMS)):
        item = box.uint(2 if version == 0 else 4)
        yield item, [number & mask for number in box.uints(box.uint(1), size)]


def _read_canvas(items: Items, item: int, data: bytes) -> None:
    """Reads the size that a grid or an overlay has of its own (23008-12, section 6.6.2)."""
    skipped = {b"grid": 2, b"iovl": 8}.get(items.kinds.get(item, b""))
    if skipped is None:
        return
    content = items.head(item, data)
    canvas = _Reader(content, 0, len(content))
    _, flags = canvas.uint(1), canvas.uint(1)
    canvas.take(skipped)
    size = 4 if flags & 1 else 2
    items.pixels[item] = max(items.pixels.get(item, 0), canvas.uint(size) * canvas.uint(size))


_READERS = {
    b"pitm": _read_primary,
    b"iinf": _read_kinds,
    b"iloc": _read_extents,
    b"iref": _read_references,
    b"iprp": _read_properties,
}
