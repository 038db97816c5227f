"""The pictures of ``docs/formats.md``: what decoded files show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.photos import PHOTOS, file_of
from imagevec.images.boxes import edges
from imagevec.images.values import Box
from tests.helpers.images import encode
from tests.helpers.pipeline import decoded

_SIDE, _GAP, _LINE = 168, 8, 22
_TILE = (_SIDE, _SIDE * 2 // 3)
_FONT = ImageFont.load_default(13)

Tile = tuple[str, Image.Image]


def photo_of(name: str, width: int = 480) -> Image.Image:
    """Opens a photo of the demo, CC0."""
    place = next(place for place in PHOTOS if f"/{name}." in place)
    image = Image.open(file_of(place)).convert("RGB")
    return image.resize((width, image.height * width // image.width))


def shown(data: bytes, **options: Any) -> Image.Image:
    return Image.fromarray(decoded(data, **options).pixels)


def sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Draws tiles with a line of text above each."""
    width, height = _TILE[0] + _GAP, _TILE[1] + _LINE + _GAP
    image = Image.new("RGB", (width * len(rows[0]) - _GAP, height * len(rows) - _GAP), "white")
    draw = ImageDraw.Draw(image)
    for y, row in enumerate(rows):
        for x, (title, tile) in enumerate(row):
            draw.text((x * width, y * height + 2), title, "black", _FONT)
            fitted = tile.copy()
            fitted.thumbnail(_TILE)
            place = (x * width, y * height + _LINE)
            image.paste(fitted, place)
            box = (x * width, y * height + _LINE)
            draw.rectangle(
                (*box, box[0] + fitted.width - 1, box[1] + fitted.height - 1), None, "#999"
            )
    return image


def drawings() -> list[Image.Image]:
    """Six black drawings on transparent black, 150 x 100."""
    images = []
    for number in range(6):
        image = Image.new("RGBA", (150, 100), (0, 0, 0, 0))
        draw = ImageDraw.Draw(image)
        black = (0, 0, 0, 255)
        if number == 0:
            draw.ellipse((45, 20, 105, 80), black)
        elif number == 1:
            draw.polygon([(75, 12), (115, 88), (35, 88)], black)
        elif number == 2:
            for x in range(20, 131, 22):
                draw.rectangle((x, 15, x + 8, 85), black)
        elif number == 3:
            draw.rectangle((35, 25, 115, 75), None, black, 12)
        elif number == 4:
            draw.text((33, 18), "Ab", black, ImageFont.load_default(60))
        else:
            for y in range(20, 90, 25):
                draw.line((20, y, 60, y - 12, 90, y + 12, 130, y - 8), black, 6)
        images.append(image)
    return images


def transparency() -> Image.Image:
    files = [encode(image) for image in drawings()]
    return sheet(
        [
            [("" if number else "by default", shown(file)) for number, file in enumerate(files)],
            [
                ("" if number else 'background="white"', shown(file, background="white"))
                for number, file in enumerate(files)
            ],
        ]
    ).resize((1056 * 2 // 3, (2 * (_TILE[1] + _LINE + _GAP) - _GAP) * 2 // 3))


def truncated() -> Image.Image:
    image = photo_of("coffee")
    files = {
        "JPEG": encode(image, "JPEG", quality=85),
        "progressive JPEG": encode(image, "JPEG", quality=85, progressive=True),
        "PNG": encode(image),
    }
    return sheet(
        [
            [
                (f"{name}, {lost} % lost", shown(cut(file, lost), truncated="accept"))
                for name, file in files.items()
            ]
            for lost in (10, 50)
        ]
    )


def cut(data: bytes, percent: int) -> bytes:
    return data[: len(data) * (100 - percent) // 100]


def depth() -> Image.Image:
    grey = np.asarray(photo_of("camera").convert("L")).astype(np.uint16)
    file = encode(Image.fromarray(grey * 257 >> 4))
    temperatures = io.BytesIO()
    Image.fromarray(grey.astype(np.float32) / 255 * 45 - 5).save(temperatures, "TIFF")
    floats = temperatures.getvalue()
    return sheet(
        [
            [
                ("12 bits in 16", shown(file)),
                ("value_range=(0, 4095)", shown(file, value_range=(0.0, 4095.0))),
                ("floats, (-5, 40)", shown(floats, value_range=(-5.0, 40.0))),
                ("floats, (0, 20)", shown(floats, value_range=(0.0, 20.0))),
            ]
        ]
    )


def boxes() -> Image.Image:
    image = photo_of("coffee")
    pixels = np.asarray(image)
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    tiles: list[Tile] = []
    for number, box in enumerate(
        [Box(95, 45, 245, 180), Box(330, 90, 150, 110), Box(20, 215, 210, 100)]
    ):
        left, top, right, bottom = edges(box, image.width, image.height)
        draw.rectangle((left, top, right, bottom), None, "#ff3030", 4)
        tiles.append((f"box {number}", Image.fromarray(pixels[top:bottom, left:right])))
    return sheet([[("one image", marked), *tiles]])


PICTURES = {
    "transparency": transparency,
    "truncated": truncated,
    "depth": depth,
    "boxes": boxes,
}
