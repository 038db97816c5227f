"""Files that would take much memory or time: large ones that are no images, and small ones whose
headers promise much."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping

from PIL import Image

from tests.helpers.images import encode, photo

MEGABYTE = 1 << 20

SIGNATURES = {
    "JPEG": b"\xff\xd8\xff\xe0\0\x10",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "WEBP": b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
    "GIF": b"GIF89a\1\0\1\0",
    "BMP": b"BM",
    "TIFF": b"II*\0\x08\0\0\0",
    "AVIF": b"\0\0\0\x20ftypavif",
    "HEIF": b"\0\0\0\x20ftypheic",
}


def segment(marker: int, content: bytes = b"") -> bytes:
    """Returns a segment of a JPEG (T.81, annex B)."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_of_scans(num_scans: int, side: int = 64) -> bytes:
    """Returns a progressive grey JPEG: every further scan is empty, but visits all blocks."""
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    table = bytes([1] + 15 * [0]) + b"\0"
    first, next_bit = bytes([1, 1, 0, 0, 0, 0x01]), bytes([1, 1, 0, 0, 0, 0x10])
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + bytes(64 * [1]))
        + segment(0xC2, frame)
        + segment(0xC4, b"\0" + table)
        + segment(0xDA, first)
        + bytes((side // 8) ** 2 // 8)
        + segment(0xDA, next_bit) * (num_scans - 1)
        + b"\xff\xd9"
    )


def jpeg_after(segments: bytes) -> bytes:
    data = encode(photo(), "JPEG")
    return data[:2] + segments + data[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png_with(*chunks: bytes) -> bytes:
    data = encode(Image.new("RGB", (8, 8)))
    return data[:33] + b"".join(chunks) + data[33:]


def zeros(num_bytes: int) -> bytes:
    """Returns compressed zeros."""
    compressor = zlib.compressobj(9)
    block = bytes(MEGABYTE)
    parts = [compressor.compress(block) for _ in range(num_bytes // MEGABYTE)]
    return b"".join(parts) + compressor.flush()


def tiff_of(
    entries: list[tuple[int, int, int, int]], rest: bytes = b"", following: int = 0
) -> bytes:
    """Returns a grey TIFF of 8x8 pixels with further entries: tag, type, count and value."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1), (278, 8)]
    all_entries = [(tag, 4, 1, value) for tag, value in [*tags, (279, 64)]]
    replaced = {entry[0] for entry in entries}
    all_entries = [entry for entry in all_entries if entry[0] not in replaced] + entries
    packed = b"".join(struct.pack("<HHII", *entry) for entry in all_entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(all_entries))
    return head + packed + struct.pack("<I", following) + rest


def tiff_of_directories(count: int) -> bytes:
    one = tiff_of([])[8:-4]
    starts = [8 + number * (len(one) + 4) for number in range(1, count)]
    return b"II*\0\x08\0\0\0" + b"".join(one + struct.pack("<I", start) for start in [*starts, 8])


def big_tiff_of(num_entries: int) -> bytes:
    entry = struct.pack("<HHQ8s", 700, 1, 1, bytes(8))
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, num_entries) + entry * num_entries


def animation(format: str, num_frames: int = 300) -> bytes:
    frames = [Image.new("RGB", (16, 16), (number % 256, 0, 9)) for number in range(num_frames)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:])


def gif(canvas: tuple[int, int], frame: tuple[int, int], before: bytes = b"") -> bytes:
    screen = struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    descriptor = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0)
    return b"GIF89a" + screen + before + descriptor + b"\2\2\x44\1\0;"


EXIF = b"Exif\0\0" + bytes(60_000)

# What each becomes: a code, or "decoded".
BOMBS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "jpeg, many scans": (lambda: jpeg_of_scans(10_000, 8000), "unsupported_format"),
    "jpeg, many EXIF blocks": (lambda: jpeg_after(segment(0xE1, EXIF) * 200), "unsupported_format"),
    "jpeg, many segments": (lambda: jpeg_after(segment(0xFE) * 500_000), "unsupported_format"),
    "jpeg, many application segments": (lambda: jpeg_after(segment(0xED, EXIF) * 200), "decoded"),
    "jpeg, fill bytes": (lambda: jpeg_after(b"\xff" * 2_000_000), "corrupt"),
    "png, zTXt": (lambda: png_with(chunk(b"zTXt", b"k\0\0" + zeros(1 << 26))), "decoded"),
    "png, iTXt": (lambda: png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(1 << 26))), "decoded"),
    "png, iCCP": (lambda: png_with(chunk(b"iCCP", b"k\0\0" + zeros(1 << 26))), "decoded"),
    "png, many zTXt": (
        lambda: png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000))) * 300),
        "decoded",
    ),
    "png, IDAT": (
        lambda: encode(Image.new("RGB", (8, 8)))[:33] + chunk(b"IDAT", zeros(1 << 26)),
        "decoded",
    ),
    "png, frames": (lambda: animation("PNG"), "decoded"),
    "webp, frames": (lambda: animation("WEBP"), "decoded"),
    "gif, frames": (lambda: animation("GIF"), "decoded"),
    "avif, frames": (lambda: animation("AVIF", 30), "decoded"),
    "gif, canvas": (lambda: gif((65_535, 65_535), (1, 1)), "too_large"),
    "gif, frame": (lambda: gif((8, 8), (65_535, 65_535)), "too_large"),
    "gif, comments": (lambda: gif((8, 8), (1, 1), (b"!\xfe\xff" + bytes(256)) * 20_000), "decoded"),
    "tiff, 65535 entries": (lambda: tiff_of([(700, 1, 4, 0)] * 65_526), "decoded"),
    "tiff, large counts": (
        lambda: tiff_of([(tag, 1, 2**32 - 1, 0) for tag in range(40_000, 40_999)]),
        "decoded",
    ),
    "tiff, the same bytes in 1,000 tags": (
        lambda: tiff_of([(tag, 1, 1_000_000, 0) for tag in range(40_000, 41_000)], bytes(1 << 20)),
        "decoded",
    ),
    "tiff, loop": (lambda: tiff_of([], following=8), "decoded"),
    "tiff, directories": (lambda: tiff_of_directories(3000), "decoded"),
    "tiff, strips": (
        lambda: tiff_of([(257, 4, 1, 3_000_000), (273, 4, 3_000_000, 0)], bytes(12_000_000)),
        "unsupported_format",
    ),
    "tiff, samples": (
        lambda: tiff_of([(258, 3, 100_000, 0), (277, 4, 1, 100_000)], bytes(200_000)),
        "corrupt",
    ),
    "bigtiff, entries": (lambda: big_tiff_of(500_000), "unsupported_format"),
    "ico, entries": (
        lambda: b"\0\0\1\0\xff\xff" + (b"\x40\x40\0\0\1\0\x20\0" + bytes(8)) * 65_535,
        "unsupported_format",
    ),
}
