"""Writes TIFFs of layouts that neither tifffile nor Pillow writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Literal

_KINDS = {"B": 1, "H": 3, "I": 4, "b": 6, "h": 8, "i": 9, "f": 11, "d": 12}


def tiff(
    tags: Mapping[int, tuple[str, Sequence[float]]],
    strips: Sequence[bytes],
    byte_order: Literal["<", ">"] = "<",
    tiled: bool = False,
) -> bytes:
    """Encodes a TIFF of one page (TIFF 6.0, section 2).

    Args:
        tags: By number, the ``struct`` code of a tag's type and its values. The offsets and lengths
            of the strips are added.
        strips: The encoded pixels.
        byte_order: As in ``struct``.
        tiled: Whether the strips are tiles.
    """
    file = bytearray(b"II" if byte_order == "<" else b"MM")
    file += struct.pack(f"{byte_order}HI", 42, 0)
    offsets = []
    for strip in strips:
        offsets.append(len(file))
        file += strip + bytes(len(strip) % 2)
    lengths = [len(strip) for strip in strips]
    entries = b""
    places = {324: offsets, 325: lengths} if tiled else {273: offsets, 279: lengths}
    all_tags = {**tags, **{tag: ("I", values) for tag, values in places.items()}}
    for tag, (code, values) in sorted(all_tags.items()):
        packed = struct.pack(f"{byte_order}{len(values)}{code}", *values)
        if len(packed) > 4:
            place = struct.pack(f"{byte_order}I", len(file))
            file += packed + bytes(len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(f"{byte_order}HHI", tag, _KINDS[code], len(values)) + place
    struct.pack_into(f"{byte_order}I", file, 4, len(file))
    count = struct.pack(f"{byte_order}H", len(entries) // 12)
    return bytes(file + count + entries + bytes(4))
