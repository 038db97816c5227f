"""Corrects how Pillow decodes TIFFs whose pixels it gets wrong, or refuses them by name.

Pillow reads uncompressed TIFFs itself, and has libtiff read the others. Found by comparing every
layout that it opens with tifffile and libvips; numbers are tags of TIFF 6.0.
"""

from __future__ import annotations

from typing import Any

from PIL import ImagePalette

from imagevec.errors import ImageError

_BITS, _PHOTOMETRIC, _SAMPLES, _STRIP_BYTES, _PLANAR = 258, 262, 277, 279, 284
_COLOUR_MAP, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT, _SUBSAMPLING = 320, 325, 338, 339, 530
_YCBCR = 6  # the value of _PHOTOMETRIC
_ASSOCIATED = 1  # the value of _EXTRA for premultiplied alpha

# libtiff returns samples in the byte order of the processor; Pillow takes that of the file.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


def repair(image: Any, with_alpha: bool) -> None:
    """Changes an open TIFF, before its pixels are loaded, so that they come out right.

    Args:
        image: An image of Pillow's TIFF plugin.
        with_alpha: Whether the alpha channel is needed.

    Raises:
        ImageError: ``unsupported_format``: neither Pillow nor its libtiff reads this layout.
    """
    if image.use_load_libtiff:
        image.tile = [
            tile._replace(args=(_NATIVE.get(tile.args[0], tile.args[0]), *tile.args[1:]))
            for tile in image.tile
        ]
    if is_planar(image):
        _repair_planes(image, with_alpha)
    elif image.mode == "YCbCr" and _is_subsampled(image):
        _read_by_libtiff(image, "RGB", "RGBX")
    elif image.mode in ("P", "PA"):
        _repair_palette(image)


def is_planar(image: Any) -> bool:
    """Returns whether the samples of an open TIFF are stored in planes, one for each channel."""
    tags = image.tag_v2
    return bool(tags.get(_PLANAR, 1) == 2 and tags.get(_SAMPLES, 1) > 1)


def layout_in_words(image: Any) -> str:
    """Describes the samples of an open TIFF, such as "TIFF, 3 x 16 bit, planar"."""
    tags = image.tag_v2
    bits, kind = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))[0]
    kind = {2: " signed", 3: " float"}.get(kind, "")
    count = max(len(bits), tags.get(_SAMPLES, 1))
    return f"TIFF, {count} x {max(bits)} bit{kind}{', planar' if is_planar(image) else ''}"


def _repair_planes(image: Any, with_alpha: bool) -> None:
    """Has libtiff read planes, except those of 8 bits that Pillow reads right."""
    bits = set(image.tag_v2.get(_BITS, (1,)))
    by_libtiff = image.use_load_libtiff
    if image.tag_v2.get(_PHOTOMETRIC) == _YCBCR:
        _read_by_libtiff(image, "RGB", "RGBX")
    elif image.mode in ("RGB", "RGBA", "CMYK"):
        samples = len(image.tag_v2.get(_BITS, (1,)))
        premultiplied = _ASSOCIATED in image.tag_v2.get(_EXTRA, ())
        if by_libtiff or bits != {8} or premultiplied or samples > len(image.mode):
            raw_mode = image.mode if bits == {8} else f"{image.mode};16N"
            _read_by_libtiff(image, image.mode, raw_mode)
    elif image.mode.startswith("I;16"):
        _read_by_libtiff(image, image.mode, "I;16N")
    elif not (by_libtiff and (len(image.mode) == 1 or (image.mode == "LA" and not with_alpha))):
        raise ImageError("unsupported_format", layout_in_words(image))


def _is_subsampled(image: Any) -> bool:
    """Returns whether chroma has fewer pixels than luma, in an uncompressed YCbCr TIFF.

    It has without the tag, but many writers leave the tag out without subsampling.
    """
    tags, (width, height) = image.tag_v2, image.size
    if _SUBSAMPLING in tags:
        return bool(tags[_SUBSAMPLING] != (1, 1))
    stored = tags.get(_STRIP_BYTES) or tags.get(_TILE_BYTES) or (0,)
    return bool(sum(stored) < 3 * width * height)


def _repair_palette(image: Any) -> None:
    """Some writers give 8 bits to the colours of a palette, which has 16. libtiff does the same."""
    colours = image.tag_v2[_COLOUR_MAP]
    if max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _read_by_libtiff(image: Any, mode: str, raw_mode: str) -> None:
    """Has libtiff read an image that Pillow would read itself, as ``TiffImagePlugin`` does."""
    tile = image.tile[0]
    image._mode = mode
    image.use_load_libtiff = True
    arguments = (raw_mode, False, image.tag_v2.offset)
    image.tile = [
        tile._replace(
            codec_name="libtiff",
            extents=(0, 0, *image._tile_size),
            offset=0,
            args=arguments,
        )
    ]
