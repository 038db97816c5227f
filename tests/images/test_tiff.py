"""Layouts of TIFFs, written by tifffile, libvips, ImageMagick or by hand, and judged by another."""

from __future__ import annotations

import io
import itertools
import subprocess
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image

from imagevec import ImageError
from imagevec.images.decode import Pixels
from tests.helpers.images import cosine, encode, photo
from tests.helpers.judges import (
    IMAGEMAGICK,
    SAME,
    assert_same,
    by_imagemagick,
    by_tifffile,
    by_vips,
    needs_imagemagick,
)
from tests.helpers.pipeline import decoded, pixels_of
from tests.helpers.tiff import tiff

WIDTH, HEIGHT = 80, 64
PHOTO = photo(WIDTH, HEIGHT)
RGB = np.array(PHOTO)
GREY = np.array(PHOTO.convert("L"))
ALPHA = np.array(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
CMYK = np.array(PHOTO.convert("CMYK"))
SAMPLES = {"grey": GREY, "RGB": RGB, "CMYK": CMYK}
PHOTOMETRIC = {"grey": "minisblack", "RGB": "rgb", "CMYK": "separated"}


def shown(colours: str) -> Pixels:
    grey = np.repeat(GREY[:, :, None], 3, axis=2)
    return {
        "grey": grey,
        "RGB": RGB,
        "CMYK": pixels_of(Image.fromarray(CMYK, "CMYK").convert("RGB")),
    }[colours]


def planes(samples: np.ndarray) -> np.ndarray:
    return np.moveaxis(samples, 2, 0).copy()


def written(samples: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def by_hand(
    channels: int, bits: int, photometric: int, strips: Sequence[bytes], **tags: Any
) -> bytes:
    """Encodes a TIFF; ``tags`` are named ``t`` and their number."""
    basic: dict[int, Any] = {
        256: ("H", [WIDTH]),
        257: ("H", [HEIGHT]),
        258: ("H", [bits] * channels),
        259: ("H", [1]),
        262: ("H", [photometric]),
        277: ("H", [channels]),
        278: ("H", [HEIGHT]),
    }
    byte_order, tiled = tags.pop("byte_order", "<"), tags.pop("tiled", False)
    given = {int(name[1:]): tags[name] for name in tags}
    return tiff({**basic, **given}, strips, byte_order, tiled)


@pytest.mark.parametrize(
    ("colours", "planar"),
    [("grey", False), *itertools.product(("RGB", "CMYK"), (False, True))],
    ids=lambda value: {True: "planar", False: "contiguous"}.get(value, value),
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 7},
        {"tile": (32, 48)},
        {"compression": "zlib", "predictor": True},
        {"compression": "zlib", "tile": (32, 32)},
    ],
    ids=str,
)
def test_pixels_do_not_depend_on_the_layout(colours, dtype, byte_order, options, planar):
    samples = SAMPLES[colours] * np.uint16(257) if dtype == "uint16" else SAMPLES[colours]
    layout = {"planarconfig": "separate"} if planar else {}
    data = written(
        planes(samples) if planar else samples,
        photometric=PHOTOMETRIC[colours],
        byteorder=byte_order,
        **options,
        **layout,
    )
    assert np.array_equal(decoded(data).pixels, shown(colours))
    stored = by_tifffile(data)
    assert np.array_equal(stored, samples)
    if not ("tile" in options and planar) and colours != "CMYK":  # for which libvips has a profile
        assert np.array_equal(by_vips(data), shown(colours))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "extra", [["unassalpha"], ["unspecified"], ["unassalpha", "unspecified"]], ids=str
)
def test_extra_planes_do_not_matter(compression, dtype, extra):
    channels = np.dstack([RGB, ALPHA, ALPHA[::-1]][: 1 + len(extra)])
    samples = channels * np.uint16(257) if dtype == "uint16" else channels
    data = written(
        planes(samples),
        photometric="rgb",
        planarconfig="separate",
        extrasamples=extra,
        compression=compression,
    )
    assert np.array_equal(by_tifffile(data), samples)
    try:
        assert np.array_equal(decoded(data).pixels, RGB)
    except ImageError as error:
        assert (extra, dtype) in NAMED_EXTRA_PLANES
        assert error.detail.startswith(f"TIFF, {3 + len(extra)} x {samples.itemsize * 8} bit")


# Pillow does not open them.
NAMED_EXTRA_PLANES = [
    (["unspecified"], "uint8"),  # only if they are not compressed
    (["unassalpha", "unspecified"], "uint16"),
]


def vips_image(colours: str, bits: int) -> Any:
    image: Any = pyvips.Image.new_from_array(SAMPLES[colours])
    if bits == 16:
        image = (image * 257).cast("ushort")
    kinds = {("grey", 8): "b-w", ("grey", 16): "grey16", ("RGB", 8): "srgb", ("RGB", 16): "rgb16"}
    return image.copy(interpretation=kinds[colours, bits])


@pytest.mark.parametrize("compression", ["none", "deflate", "lzw", "packbits"])
@pytest.mark.parametrize("predictor", ["none", "horizontal"])
@pytest.mark.parametrize("tile", [False, True], ids=["strips", "tiles"])
@pytest.mark.parametrize(("colours", "bits"), [*itertools.product(("grey", "RGB"), (8, 16))])
def test_compressions_of_libvips(compression, predictor, tile, colours, bits):
    options = {"tile_width": 32, "tile_height": 32} if tile else {}
    if compression in ("deflate", "lzw"):
        options["predictor"] = predictor
    image = vips_image(colours, bits)
    data = image.tiffsave_buffer(compression=compression, tile=tile, **options)
    assert np.array_equal(decoded(data).pixels, shown(colours))


@pytest.mark.parametrize("colours", ["grey", "RGB"])
@pytest.mark.parametrize("options", [{}, {"tile": True}, {"rgbjpeg": True}], ids=str)
def test_jpeg_in_tiff(colours, options):
    data = vips_image(colours, 8).tiffsave_buffer(compression="jpeg", **options)
    assert_same(decoded(data).pixels, by_vips(data))


@pytest.mark.parametrize("compression", ["none", "packbits", "ccittfax4"])
@pytest.mark.parametrize("tile", [False, True], ids=["strips", "tiles"])
def test_bilevel(compression, tile):
    image = vips_image("grey", 8) > 127
    data = image.tiffsave_buffer(compression=compression, tile=tile, bitdepth=1)
    assert np.array_equal(decoded(data).pixels, shown("grey") // 128 * 255)
    assert np.array_equal(decoded(data).pixels, by_vips(data))


@needs_imagemagick
@pytest.mark.parametrize(
    "options",
    [
        "-endian MSB -compress LZW",
        "-endian MSB -compress RLE -depth 16",
        "-define tiff:fill-order=lsb2msb",
        "-define tiff:fill-order=lsb2msb -colorspace gray -depth 16",
        "-define tiff:fill-order=lsb2msb -threshold 50% -compress Group4",
        "-threshold 50% -compress Fax",
        "-interlace plane -depth 16",
        "-interlace plane -depth 16 -compress LZW",
        "-colorspace YCbCr",
        "-colors 200 -type palette",
        "-colors 16 -type palette -depth 4",
        "-colorspace gray -depth 12 -compress LZW",
        "-colorspace gray -depth 4",
        "-colorspace gray -depth 2 -compress zip",
        "-colorspace CMYK -depth 16",
        "-define tiff:alpha=associated -depth 16",
        "-compress JPEG -quality 95",
    ],
)
def test_layouts_of_imagemagick(options):
    command = [str(IMAGEMAGICK), "png:-", *options.split(), "tiff:-"]
    data = subprocess.run(command, input=encode(PHOTO), capture_output=True, check=True).stdout
    assert_same(decoded(data).pixels, by_imagemagick(data, "tiff", "white"))


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize(
    ("width", "height", "is_named"),
    [(1, 1, True), (2, 2, True), (2, 2, False), (2, 1, True), (1, 2, True), (4, 4, True)],
)
def test_uncompressed_ycbcr(byte_order, width, height, is_named):
    """A block of pixels has a luma for each, and one chroma (TIFF 6.0, section 21)."""
    full = np.array(PHOTO.convert("YCbCr"))
    rows, columns = HEIGHT // height, WIDTH // width
    blocks = full.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
    luma = blocks[..., 0].reshape(rows, columns, -1)
    chroma = np.rint(blocks[..., 1:].mean(axis=(2, 3)))
    strip = np.concatenate([luma, chroma], axis=2).astype(np.uint8).tobytes()
    tags: Any = {"t530": ("H", [width, height])} if is_named else {}
    data = by_hand(3, 8, 6, [strip], byte_order=byte_order, **tags)
    few = Image.fromarray(full, "YCbCr")
    few = few.resize((columns, rows), Image.Resampling.BOX).resize((WIDTH, HEIGHT), 0)
    expected = np.dstack([full[:, :, :1], np.array(few)[:, :, 1:]])
    assert_same(decoded(data).pixels, pixels_of(Image.fromarray(expected, "YCbCr").convert("RGB")))
    if (width, height) != (1, 1):  # which libvips does not convert
        assert_same(decoded(data).pixels, by_vips(data))


@pytest.mark.parametrize("compressed", [False, True])
def test_planes_of_ycbcr(compressed):
    full = np.array(PHOTO.convert("YCbCr"))
    strips = [plane.tobytes() for plane in planes(full)]
    tags: Any = {"t284": ("H", [2]), "t530": ("H", [1, 1])}
    if compressed:
        strips, tags["t259"] = [zlib.compress(strip) for strip in strips], ("H", [8])
    assert_same(decoded(by_hand(3, 8, 6, strips, **tags)).pixels, RGB)


@pytest.mark.parametrize(
    ("subsampled", "is_named"),
    [(False, True), (False, False), (True, True)],  # no one can tell the fourth from the second
)
def test_tiles_of_ycbcr(subsampled, is_named):
    """One tile that is larger than the image."""
    full = np.zeros((128, 128, 3), np.uint8)
    full[:HEIGHT, :WIDTH] = np.array(PHOTO.convert("YCbCr"))
    tile, factors = full.tobytes(), [1, 1]
    if subsampled:
        blocks = full.reshape(64, 2, 64, 2, 3).transpose(0, 2, 1, 3, 4)
        chroma = np.rint(blocks[..., 1:].mean(axis=(2, 3)))
        luma = blocks[..., 0].reshape(64, 64, 4)
        tile, factors = np.concatenate([luma, chroma], axis=2).astype(np.uint8).tobytes(), [2, 2]
    sizes: Any = {"t322": ("H", [128]), "t323": ("H", [128])}
    tags = {**sizes, "t530": ("H", factors)} if is_named else sizes
    data = by_hand(3, 8, 6, [tile], tiled=True, **tags)
    lost = 0.001 if subsampled else 0
    assert cosine(decoded(data).pixels.ravel(), RGB.ravel()) > SAME - lost


@pytest.mark.parametrize("factor", [1, 256, 257], ids=["8 bit", "high byte", "16 bit"])
def test_colours_of_a_palette_may_have_8_bits(factor):
    indexed = PHOTO.quantize(200)
    colours = np.zeros((256, 3), int)
    colours[:200] = np.array(indexed.getpalette()).reshape(-1, 3)
    strip = np.asarray(indexed).tobytes()
    data = by_hand(1, 8, 3, [strip], t320=("H", (colours.T * factor).ravel().tolist()))
    assert np.array_equal(decoded(data).pixels, pixels_of(indexed.convert("RGB")))
    assert np.array_equal(decoded(data).pixels, by_vips(data))


def test_jpeg_of_the_old_kind():
    jpeg = encode(PHOTO, "JPEG", quality=95)

    def old(start: int) -> bytes:  # TIFF 6.0, section 22
        tags: Any = {"t259": ("H", [6]), "t512": ("H", [1]), "t513": ("I", [start])}
        return by_hand(3, 8, 6, [jpeg], **tags, t514=("I", [len(jpeg)]), t530=("H", [2, 2]))

    data = old(old(0).index(jpeg))
    assert_same(decoded(data).pixels, decoded(jpeg).pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"value_range": (1000, 1255)}], ids=["planes", "range"])
def test_orientation_is_applied_once(orientation, options):
    samples = RGB.astype(np.uint16) + np.uint16(1000) if options else RGB * np.uint16(257)
    layout: Any = {} if options else {"planarconfig": "separate"}
    data = written(
        samples if options else planes(samples),
        photometric="rgb",
        extratags=[(274, "H", 1, orientation, True)],
        **layout,
    )
    exif = Image.Exif()
    exif[274] = orientation
    expected = decoded(encode(PHOTO, exif=exif))
    image = decoded(data, **options)
    assert (image.width, image.height) == (expected.width, expected.height)
    assert np.array_equal(image.pixels, expected.pixels)


GREY_16 = GREY * np.uint16(257)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (by_hand(3, 8, 8, [bytes(WIDTH * HEIGHT)] * 3, t284=("H", [2])), "TIFF, 3 x 8 bit, planar"),
        (written(GREY_16, photometric="miniswhite", byteorder=">"), "TIFF, 1 x 16 bit"),
        (written(GREY.astype("float64"), photometric="minisblack"), "TIFF, 1 x 64 bit float"),
        (written(GREY.astype("float16"), photometric="minisblack"), "TIFF, 1 x 16 bit float"),
        (written(RGB.astype("float32"), photometric="rgb"), "TIFF, 3 x 32 bit float"),
        (written(RGB.astype("int16"), photometric="rgb"), "TIFF, 3 x 16 bit signed"),
        (written(RGB.astype("int8"), photometric="rgb"), "TIFF, 3 x 8 bit signed"),
        (written(GREY.astype(">u4"), byteorder=">", photometric="minisblack"), "TIFF, 1 x 32 bit"),
        (
            written(np.dstack([GREY_16, GREY_16]), extrasamples=["unassalpha"], photometric=1),
            "TIFF, 2 x 16 bit",
        ),
        (by_hand(1, 14, 1, [bytes(WIDTH * HEIGHT * 14 // 8)]), "TIFF, 1 x 14 bit"),
        (by_hand(1, 12, 1, [bytes(WIDTH * HEIGHT * 12 // 8)], byte_order=">"), "TIFF, 1 x 12 bit"),
        (by_hand(3, 4, 2, [bytes(WIDTH * HEIGHT * 12 // 8)]), "TIFF, 3 x 4 bit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("options", [{}, {"value_range": (0, 255)}], ids=["", "range"])
def test_layouts_that_are_not_read_right_are_named(data, words, options):
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    assert error.value.code == "unsupported_format"
    assert error.value.detail.startswith(words)
