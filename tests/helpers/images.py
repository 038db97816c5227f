"""Small images, generated deterministically."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pillow_heif
from PIL import Image

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")

# The modes that Pillow writes without conversion. WEBP and AVIF support only colour.
MODES_OF_FORMAT = {
    "JPEG": ("1", "L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "HEIF": ("L", "RGB", "RGBA"),
}

FORMATS_AND_MODES = [
    (format, mode) for format in MODES_OF_FORMAT for mode in MODES_OF_FORMAT[format]
]


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """Generates an RGB image with large shapes, detail and noise, like a photo."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, amplitude in ((4, 90.0), (16, 30.0)):
        grid = rng.normal(0, amplitude, (3, cells, cells)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), 3) for plane in grid]
        pixels += np.stack([np.asarray(plane) for plane in planes], axis=2)
    pixels += rng.normal(0, 5, pixels.shape) + 128
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def of_mode(mode: str, width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """Converts ``photo`` to one of ``MODES``; alpha goes from transparent to opaque."""
    image = photo(width, height, seed)
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16)
        return Image.fromarray(grey * 256 + 255 - grey)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize((width, height)))
        return image
    return image.convert(mode)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Returns the bytes of an image file."""
    file = io.BytesIO()
    if format == "HEIF":  # its package would have to be registered with Pillow
        pillow_heif.encode(image.mode, image.size, image.tobytes(), file, **options)
        return file.getvalue()
    if format == "AVIF":
        options = {"speed": 10, **options}
    image.save(file, format, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    """Opens an image file with Pillow, and HEIF with its plugin, which is not registered."""
    if data[4:8] == b"ftyp" and data[8:11] != b"avi":
        return pillow_heif.HeifImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data))


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG file that ends where its pixels should begin."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + struct.pack(">I", 1 << 20) + b"IDAT"


def tiff_16_bit(grey: np.ndarray, byte_order: Literal["<", ">"]) -> bytes:
    """Encodes uint16 ``(H, W)`` as an uncompressed grey TIFF (TIFF 6.0, sections 2 and 4)."""
    height, width = grey.shape
    pixels = grey.astype(f"{byte_order}u2").tobytes()
    short, long = 3, 4
    tags = [
        (256, short, width),
        (257, short, height),
        (258, short, 16),  # bits per sample
        (259, short, 1),  # no compression
        (262, short, 1),  # black is zero
        (273, long, 8),  # offset of the pixels
        (277, short, 1),
        (278, short, height),
        (279, long, len(pixels)),
    ]
    file = b"II" if byte_order == "<" else b"MM"
    file += struct.pack(f"{byte_order}HI", 42, 8 + len(pixels)) + pixels
    file += struct.pack(f"{byte_order}H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(f"{byte_order}H2x" if kind == short else f"{byte_order}I", value)
        file += struct.pack(f"{byte_order}HHI", tag, kind, 1) + packed
    return file + struct.pack(f"{byte_order}I", 0)


def cosine(a: Any, b: Any) -> np.ndarray:
    """Computes cosines between rows of two arrays ``(N, D)``, or of two vectors ``(D,)``."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / norms
