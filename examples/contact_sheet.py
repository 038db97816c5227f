"""Draws photos and their nearest neighbours on a contact sheet."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE, CAPTION, GAP, MARGIN = 164, 32, 10, 32
HEADER = 96
PAPER, INK, FAINT = "#faf9f6", "#22252a", "#6b7079"
PHOTO, VARIANT, STRANGER = "#22252a", "#2f9e63", "#c4c0b7"
COLUMNS = 2


def draw_contact_sheet(
    neighbours: dict[str, list[tuple[str, float]]], folder: Path, path: Path
) -> None:
    """Writes a PNG that shows each photo, followed by its nearest neighbours with name and cosine.

    Args:
        neighbours: Names and cosines of the neighbours, by file name of the photo.
        folder: Folder of these files.
        path: Path of the PNG.
    """
    tiles = 1 + max(map(len, neighbours.values()))
    strip_width = tiles * (TILE + GAP) + GAP
    strip_height = TILE + CAPTION + GAP
    lines = -(-len(neighbours) // COLUMNS)
    width = 2 * MARGIN + COLUMNS * strip_width + (COLUMNS - 1) * MARGIN
    sheet = Image.new("RGB", (width, HEADER + lines * strip_height + MARGIN), PAPER)
    _draw_header(sheet)
    for index, (name, near) in enumerate(neighbours.items()):
        column, line = divmod(index, lines)
        left = MARGIN + column * (strip_width + MARGIN)
        top = HEADER + line * strip_height
        _draw_strip(sheet, (left, top), folder, name, near)
    sheet.save(path)


def _draw_header(sheet: Image.Image) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 20), "Photos and their nearest neighbours", INK, _font(28))
    legend = (
        "Black: a photo. Green: a variant of it. Grey: another photo. "
        "Numbers: cosines of feature vectors."
    )
    draw.text((MARGIN, 56), legend, FAINT, _font(18))


def _draw_strip(
    sheet: Image.Image,
    corner: tuple[int, int],
    folder: Path,
    name: str,
    near: list[tuple[str, float]],
) -> None:
    photo = Path(name).stem
    left, top = corner
    _draw_tile(sheet, (left, top), folder / name, PHOTO, photo, "")
    for place, (other, cosine) in enumerate(near, start=1):
        is_variant = other.startswith(f"{photo}-")
        caption = other.removeprefix(f"{photo}-")
        colour = VARIANT if is_variant else STRANGER
        at = (left + place * (TILE + GAP) + GAP, top)
        _draw_tile(sheet, at, folder / other, colour, Path(caption).stem, f"{cosine:.2f}")


def _draw_tile(
    sheet: Image.Image, corner: tuple[int, int], file: Path, colour: str, name: str, cosine: str
) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=colour)
    photo = ImageOps.fit(Image.open(file).convert("RGB"), (TILE - 8, TILE - 8))
    sheet.paste(photo, (left + 4, top + 4))
    draw.text((left + 2, top + TILE + 4), name, INK, _font(15))
    draw.text((left + TILE - 2, top + TILE + 4), cosine, INK, _font(15), anchor="ra")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
