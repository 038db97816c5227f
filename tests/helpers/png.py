"""Writes PNGs of depths and with chunks that Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(samples: np.ndarray, bits: int, *chunks: bytes) -> bytes:
    """Encodes a PNG of grey, RGB or both with alpha, not interlaced and without filters.

    Args:
        samples: Integers, ``(H, W, C)``.
        bits: Bits per sample: 1, 2, 4, 8 or 16.
        chunks: To be put before the pixels.
    """
    height, width, channels = samples.shape
    colour_type = (0, 4, 2, 6)[channels - 1]
    wide = samples.astype(">u2").reshape(height, -1, 1).view(np.uint8)  # (H, W x C, 2)
    rows = np.packbits(np.unpackbits(wide, axis=2)[:, :, 16 - bits :].reshape(height, -1), axis=1)
    filtered = np.pad(rows, ((0, 0), (1, 0)))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)
    return file + chunk(b"IDAT", zlib.compress(filtered.tobytes())) + chunk(b"IEND", b"")
