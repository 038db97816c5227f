"""Kinds of image files: what each shows by default, and with which options.

``test_kinds.py`` runs them, and compares the tables of ``docs/formats.md``. A new kind is one more
entry of ``KINDS``.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from imagevec.images.decode import Pixels
from tests.helpers.images import encode, photo, png_header
from tests.helpers.tiff import tiff
from tests.images.test_formats import LAYOUTS, NAMED

WIDTH, HEIGHT = 96, 72
PHOTO = photo(WIDTH, HEIGHT)
GREY = np.asarray(PHOTO.convert("L"))
SHARP = {"quality": 98, "subsampling": 0}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        group: The table of the page.
        name: The first cell.
        data: The file.
        shows: The picture, uint8 ``(H, W, 3)``; ``None`` for a file that is refused.
        options: What makes it show ``shows``. Without, it does so by default.
        default: The second cell: ``"the picture"``, words for another picture, or the beginning of
            the error.
    """

    group: str
    name: str
    data: bytes
    shows: Pixels | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    default: str = "the picture"


def rgb(image: Image.Image | np.ndarray) -> Pixels:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.array(image.convert("RGB"))


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def with_chunk(png: bytes, inserted: bytes) -> bytes:
    """Inserts a chunk behind the header of a PNG."""
    return png[:33] + inserted + png[33:]


def wrong_checksum(png: bytes, kind: bytes) -> bytes:
    start = png.index(kind)
    length = int.from_bytes(png[start - 4 : start], "big")
    end = start + 4 + length
    return png[:end] + bytes([png[end] ^ 1]) + png[end + 1 :]


def numpy_tiff(samples: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric=options.pop("photometric", "minisblack"), **options)
    return file.getvalue()


def drawing() -> Image.Image:
    """A black shape on transparent black, as icons and logos are."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 10, 76, 62), fill=(0, 0, 0, 255))
    draw.rectangle((60, 40, 90, 66), fill=(0, 0, 0, 255))
    return image


DRAWING = drawing()
ON_WHITE = rgb(Image.alpha_composite(Image.new("RGBA", DRAWING.size, "white"), DRAWING))
WHITE = {"background": "white"}
PNG = encode(PHOTO)
JPEG = encode(PHOTO, "JPEG", **SHARP)
PROGRESSIVE = encode(PHOTO, "JPEG", progressive=True, **SHARP)


def long_text() -> PngInfo:
    text = PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    return text


def premultiplied() -> bytes:
    grey, alpha = GREY // 2, np.full_like(GREY, 128)
    return numpy_tiff(np.stack([grey, alpha], 2), extrasamples=["ASSOCALPHA"])


def half_over_white() -> Pixels:
    straight = np.minimum(GREY // 2 * 255.0 / 128, 255)
    return rgb(np.rint(straight * 128 / 255 + 255 * 127 / 255).astype(np.uint8))


def significant(samples: np.ndarray, bits: int) -> bytes:
    png = encode(Image.fromarray(samples.astype(np.uint16)))
    return with_chunk(png, chunk(b"sBIT", bytes([bits])))


def palette() -> bytes:
    image = Image.new("P", DRAWING.size)
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.putdata((np.asarray(DRAWING)[:, :, 3] // 255).ravel().tolist())
    return encode(image, transparency=0)


def animation(format: str, **options: Any) -> bytes:
    more = [photo(WIDTH, HEIGHT, seed) for seed in (1, 2)]
    return encode(PHOTO, format, save_all=True, append_images=more, **options)


def formats() -> list[Kind]:
    by_default = {
        "JPEG": JPEG,
        "JPEG, progressive": PROGRESSIVE,
        "JPEG, CMYK": encode(PHOTO.convert("CMYK"), "JPEG", **SHARP),
        "PNG": PNG,
        "WebP": encode(PHOTO, "WEBP", lossless=True),
        "BMP": encode(PHOTO, "BMP"),
        "TIFF": encode(PHOTO, "TIFF", compression="tiff_lzw"),
        "AVIF": encode(PHOTO, "AVIF", quality=95, subsampling="4:4:4"),
        "HEIC, with the extra `heif`": encode(PHOTO, "HEIF", quality=95),
        "animated PNG, WebP or AVIF: its first frame": animation("PNG"),
        "TIFF of several pages: its first page": animation("TIFF"),
    }
    kinds = [Kind("formats", name, data, rgb(PHOTO)) for name, data in by_default.items()]
    gif = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
    kinds.insert(6, Kind("formats", "GIF: its first frame", encode(gif, "GIF"), rgb(gif)))
    for name, title in (("JPEG2000", "JPEG 2000"), ("ICO", "ICO")):
        named = {"formats": [name]}
        options = {"sizes": [(WIDTH, HEIGHT)]} if name == "ICO" else {}
        data = encode(PHOTO, name, **options)
        kinds.append(Kind("formats", title, data, rgb(PHOTO), named, "unsupported_format"))
    return kinds


def refused() -> list[Kind]:
    names = ["JPEG XL", "SVG", "PDF", "MP4", "MOV", "PSD", "DNG", "CR2", "NEF", "ARW"]
    names += ["HTML", "JSON", "Git LFS"]
    layouts = {
        "TIFF, 5 channels": "5 x 16 bit",
        "TIFF, colours of 32 bits": "32-bit RGB",
        "TIFF with JPEG 2000 inside": "JPEG 2000 in a TIFF",
        "JPEG of 12 bits": "12-bit JPEG",
        "JPEG-LS": "JPEG-LS",
    }
    files = {name: NAMED[name] for name in names}
    files |= {title: LAYOUTS[name] for title, name in layouts.items()}
    return [
        Kind("refused", name, data, default="unsupported_format")
        for name, (data, _) in files.items()
    ]


def damaged() -> list[Kind]:
    shown = rgb(PHOTO)
    text = PngInfo()
    text.add_text("Comment", "a comment")
    with_text = encode(PHOTO, pnginfo=text)
    cut = JPEG[: len(JPEG) // 2]
    kinds = [
        Kind(
            "damaged",
            "PNG, wrong checksum of a text or colour profile",
            wrong_checksum(with_text, b"tEXt"),
            shown,
        ),
        Kind("damaged", "PNG, a text of 2 MB", encode(PHOTO, pnginfo=long_text()), shown),
        Kind(
            "damaged",
            "PNG, a resolution of 3 bytes",
            with_chunk(PNG, chunk(b"pHYs", b"abc")),
            shown,
        ),
        Kind("damaged", "PNG without its end", PNG[:-12], shown),
        Kind("damaged", "JPEG without its end marker", JPEG[:-2], shown),
        Kind("damaged", "JPEG with zeros in place of its end marker", JPEG[:-2] + bytes(2), shown),
        Kind("damaged", "JPEG, progressive, without its end marker", PROGRESSIVE[:-2], shown),
    ]
    accepted = {"truncated": "accept"}
    parts = {
        "JPEG cut in half": cut,
        "PNG cut in half": PNG[: len(PNG) // 2],
        "TIFF cut in half": encode(PHOTO, "TIFF")[: 3 * WIDTH * HEIGHT // 2],
        "BMP cut in half": encode(PHOTO, "BMP")[: 3 * WIDTH * HEIGHT // 2],
    }
    kinds += [
        Kind("damaged", name, data, shown[: HEIGHT // 3], accepted, "truncated")
        for name, data in parts.items()
        if not name.startswith("BMP")
    ]
    bmp = parts["BMP cut in half"]  # from its lowest row upwards
    kinds.append(
        Kind("damaged", "BMP cut in half", bmp, shown[-HEIGHT // 3 :], accepted, "truncated")
    )
    webp = encode(PHOTO, "WEBP")
    avif = encode(PHOTO, "AVIF")
    kinds += [
        Kind("damaged", "WebP cut in half", webp[: len(webp) // 2], default="truncated"),
        Kind("damaged", "AVIF cut in half", avif[: len(avif) // 2], default="truncated"),
        Kind("damaged", "PNG without pixels", png_header(WIDTH, HEIGHT), default="truncated"),
    ]
    return kinds


def transparent() -> list[Kind]:
    files = {
        "PNG with alpha": encode(DRAWING),
        "PNG, grey with alpha": encode(DRAWING.convert("LA")),
        "PNG, a transparent colour of a palette": palette(),
        "WebP with alpha": encode(DRAWING, "WEBP", lossless=True, exact=True),
        "AVIF with alpha": encode(DRAWING, "AVIF", quality=95),
        "GIF with a transparent colour": encode(DRAWING, "GIF"),
        "TIFF with alpha": encode(DRAWING, "TIFF"),
        "HEIC with alpha": encode(DRAWING, "HEIF", quality=95),
    }
    dark = "a black image"
    kinds = [
        Kind("transparency", name, data, ON_WHITE, WHITE, dark) for name, data in files.items()
    ]
    kinds.append(
        Kind(
            "transparency",
            "TIFF with premultiplied alpha",
            premultiplied(),
            half_over_white(),
            WHITE,
            "the colours, without alpha",
        )
    )
    kinds.append(Kind("transparency", "JPEG and others without alpha", JPEG, rgb(PHOTO), WHITE))
    return kinds


def deep() -> list[Kind]:
    full = GREY.astype(np.uint16) * 257
    shown = rgb(GREY)
    none = "unsupported_format"

    def ranged(low: float, high: float) -> dict[str, Any]:
        return {"value_range": (low, high)}

    inverted = {
        256: ("H", [WIDTH]),
        257: ("H", [HEIGHT]),
        258: ("H", [16]),
        259: ("H", [1]),
        262: ("H", [0]),
        277: ("H", [1]),
        278: ("H", [HEIGHT]),
    }
    colour = rgb(PHOTO).astype(np.uint16) * 257
    return [
        Kind("depth", "PNG or TIFF, 16 bit", encode(Image.fromarray(full)), shown),
        Kind(
            "depth", "TIFF, 16 bit, 0 is white", tiff(inverted, [(65535 - full).tobytes()]), shown
        ),
        Kind("depth", "TIFF, 3 x 16 bit", numpy_tiff(colour, photometric="rgb"), rgb(PHOTO)),
        Kind(
            "depth",
            "PNG or TIFF, 12 bits in 16",
            encode(Image.fromarray(full >> 4)),
            shown,
            ranged(0, 4095),
            "a dark image",
        ),
        Kind("depth", "PNG, 12 bits in 16, declared by `sBIT`", significant(full >> 4, 12), shown),
        Kind(
            "depth",
            "TIFF, 12 bits in 16, declared by `MaxSampleValue`",
            numpy_tiff(full >> 4, extratags=[(281, "H", 1, 4095, True)]),
            shown,
        ),
        Kind(
            "depth",
            "TIFF, int16",
            numpy_tiff((full.astype(np.int32) - 32768).astype(np.int16)),
            shown,
            ranged(-32768, 32767),
            none,
        ),
        Kind(
            "depth",
            "TIFF, int32",
            numpy_tiff(GREY.astype(np.int32) * 1000 - 70_000),
            shown,
            ranged(-70_000, 185_000),
            none,
        ),
        Kind(
            "depth",
            "TIFF, uint32",
            numpy_tiff(GREY.astype(np.uint32) * 16_000_000),
            shown,
            ranged(0, 4_080_000_000),
            none,
        ),
        Kind(
            "depth",
            "TIFF, float32",
            numpy_tiff(GREY.astype(np.float32) / 255),
            shown,
            ranged(0, 1),
            none,
        ),
    ]


KINDS = [*formats(), *refused(), *damaged(), *transparent(), *deep()]
