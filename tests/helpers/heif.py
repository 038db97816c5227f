"""Builds HEIF files from items, valid or not (ISO/IEC 14496-12 and 23008-12)."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

from tests.helpers.images import encode

ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha"


@dataclass
class Item:
    """One item of a file. Items are numbered from 1.

    Attributes:
        kind: The type, such as ``hvc1``.
        data: The coded image, or the layout of a grid.
        properties: Boxes.
        references: Numbers of other items by the type of the reference.
        extent: The offset and length of the data in the file, if they are not ``data``.
    """

    kind: bytes
    data: bytes
    properties: list[bytes] = field(default_factory=list)
    references: dict[bytes, list[int]] = field(default_factory=dict)
    extent: tuple[int, int] | None = None


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def full_box(kind: bytes, content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags) + content)


def ispe(width: int, height: int) -> bytes:
    return full_box(b"ispe", struct.pack(">II", width, height))


def clap(width: int, height: int, left: int = 0, top: int = 0) -> bytes:
    """Returns a crop. The offsets are those of its centre from the centre of the image."""
    return box(b"clap", struct.pack(">IIIIiIiI", width, 1, height, 1, left, 1, top, 1))


def irot(quarters: int) -> bytes:
    """Returns a rotation, in quarter turns to the left."""
    return box(b"irot", bytes([quarters]))


def imir(axis: int) -> bytes:
    """Returns a mirror: 0 swaps top and bottom, 1 left and right."""
    return box(b"imir", bytes([axis]))


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the type and the content of each box."""
    while data:
        size = int.from_bytes(data[:4], "big")
        yield data[4:8], data[8:size]
        data = data[size:]


def coded(image: Image.Image, **options: Any) -> Item:
    """Encodes an image as an item, which it is the only one of its file."""
    file = dict(boxes(encode(image, "HEIF", **options)))
    properties = dict(boxes(dict(boxes(dict(boxes(file[b"meta"][4:]))[b"iprp"]))[b"ipco"]))
    kept = [name for name in (b"hvcC", b"ispe", b"clap", b"pixi") if name in properties]
    return Item(b"hvc1", file[b"mdat"], [box(name, properties[name]) for name in kept])


def grid(width: int, height: int, columns: int, tiles: Sequence[int]) -> Item:
    """Returns an image made of tiles, given by their numbers."""
    rows = len(tiles) // columns
    layout = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
    return Item(b"grid", layout, [ispe(width, height)], {b"dimg": list(tiles)})


def overlay(width: int, height: int, layers: Sequence[int]) -> Item:
    """Returns images, given by their numbers, that lie on each other."""
    layout = struct.pack(">BB4HHH", 0, 0, 0, 0, 0, 65535, width, height) + bytes(4 * len(layers))
    return Item(b"iovl", layout, [ispe(width, height)], {b"dimg": list(layers)})


def alpha(image: Image.Image, of: int, **options: Any) -> Item:
    """Encodes the alpha of the image with the number ``of``."""
    item = coded(image, **options)
    item.properties.append(full_box(b"auxC", ALPHA + b"\0"))
    item.references[b"auxl"] = [of]
    return item


def heif(
    items: Sequence[Item],
    primary: int = 1,
    brands: Sequence[bytes] = (b"heic", b"mif1"),
    data_first: bool = False,
) -> bytes:
    """Returns a file.

    Args:
        items: The items.
        primary: The number of the primary image.
        brands: The major brand and the compatible ones.
        data_first: Whether the data stand before the meta box, as some programs write them.
    """
    ftyp = box(b"ftyp", brands[0] + bytes(4) + b"".join(brands))
    length = len(_meta(items, primary, 0))
    start = len(ftyp) + 8 + (0 if data_first else length)
    meta = _meta(items, primary, start)
    mdat = box(b"mdat", b"".join(item.data for item in items))
    return ftyp + (mdat + meta if data_first else meta + mdat)


def _meta(items: Sequence[Item], primary: int, start: int) -> bytes:
    kinds, places, associations, references = b"", b"", b"", b""
    properties: list[bytes] = []
    for number, item in enumerate(items, 1):
        infe = struct.pack(">HH4s", number, 0, item.kind) + b"\0"
        kinds += full_box(b"infe", infe, version=2)
        places += struct.pack(">HHHII", number, 0, 1, *(item.extent or (start, len(item.data))))
        start += len(item.data)
        associations += struct.pack(">HB", number, len(item.properties))
        for content in item.properties:
            properties.append(content)
            associations += struct.pack(">H", 0x8000 | len(properties))
        for kind, others in item.references.items():
            content = struct.pack(f">HH{len(others)}H", number, len(others), *others)
            references += box(kind, content)
    ipma = full_box(b"ipma", struct.pack(">I", len(items)) + associations, flags=1)
    content = full_box(b"hdlr", bytes(4) + b"pict" + bytes(13))
    content += full_box(b"pitm", struct.pack(">H", primary))
    content += full_box(b"iloc", struct.pack(">BBH", 0x44, 0, len(items)) + places)
    content += full_box(b"iinf", struct.pack(">H", len(items)) + kinds)
    content += box(b"iprp", box(b"ipco", b"".join(properties)) + ipma)
    content += full_box(b"iref", references)
    return full_box(b"meta", content)


def encode_16_bits(mode: str, pixels: np.ndarray, bits: int) -> bytes:
    """Encodes uint16 pixels with 10 or 12 bits."""
    file = io.BytesIO()
    pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
    size = (pixels.shape[1], pixels.shape[0])
    pillow_heif.encode(mode, size, pixels.tobytes(), file, quality=95, chroma=444)
    return file.getvalue()
