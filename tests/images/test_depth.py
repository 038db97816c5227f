from __future__ import annotations

import io
import itertools
import shutil
import subprocess
from typing import Any

import numpy as np
import pillow_heif
import pytest
import pyvips
import tifffile
from PIL import Image

from imagevec import ImageError
from imagevec.images.decode import Pixels
from imagevec.options import FORMATS, OTHER_FORMATS
from tests.helpers import pipeline
from tests.helpers.images import FORMATS_AND_MODES, cosine, encode, of_mode, photo
from tests.helpers.judges import (
    IMAGEMAGICK,
    assert_same,
    by_imagemagick,
    by_tifffile,
    by_vips,
    needs_imagemagick,
    vector,
)
from tests.helpers.png import chunk, png
from tests.helpers.tiff import tiff

WIDTH, HEIGHT = 80, 64
RGB = np.array(photo(WIDTH, HEIGHT))
GREY = np.array(photo(WIDTH, HEIGHT).convert("L"))
ALPHA = np.array(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
PICTURES = {
    "grey": GREY[:, :, None],
    "grey with alpha": np.dstack([GREY, ALPHA]),
    "RGB": RGB,
    "RGBA": np.dstack([RGB, ALPHA]),
}
by_picture = pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
MAX_SAMPLE, SMIN_SAMPLE, SMAX_SAMPLE = 281, 340, 341  # TIFF 6.0


def decoded(data: bytes, **options: Any) -> Pixels:
    return pipeline.decoded(data, formats=(*FORMATS, *OTHER_FORMATS), **options).pixels


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    assert error.value.code == "unsupported_format"
    return error.value.detail


def shown(picture: np.ndarray) -> Pixels:
    """RGB of a picture, without alpha."""
    colours = picture[:, :, : 1 if picture.shape[2] < 3 else 3]
    return np.broadcast_to(colours, (*colours.shape[:2], 3)).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def scaled(picture: np.ndarray, most: int) -> np.ndarray:
    """Integers from 0 to ``most`` for 0 to 255."""
    return (picture.astype(np.uint64) * most + 127) // 255


def written(
    samples: np.ndarray, tags: dict[int, tuple[str, Any]] | None = None, **options: Any
) -> bytes:
    """Encodes a TIFF by tifffile, with further tags."""
    extra = [
        (tag, kind, len(np.atleast_1d(value)), value, True)
        for tag, (kind, value) in (tags or {}).items()
    ]
    kind = "rgb" if samples.ndim == 3 and samples.shape[2] >= 3 else "minisblack"
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **{"photometric": kind, "extratags": extra, **options})
    return file.getvalue()


# The samples of GREY as ``low + step x level``.
NUMBERS: dict[str, tuple[float, float]] = {
    "int8": (-100, 0.5),
    "int16": (-20_000, 150),
    "int32": (-2_000_000_000, 15_000_000),
    "uint16": (300, 7),
    "uint32": (2_200_000_000, 8_000_000),  # above 2^31
    "float32": (-3, 1 / 64),
}


@pytest.mark.parametrize(
    ("dtype", "byte_order"),
    [pair for pair in itertools.product(NUMBERS, "<>") if pair != ("uint32", ">")],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_range_maps_every_kind_of_number(dtype, byte_order, compression):
    low, step = NUMBERS[dtype]
    samples = (low + step * GREY.astype(np.float64)).astype(dtype)
    data = written(samples, byteorder=byte_order, compression=compression)
    assert np.array_equal(by_tifffile(data), samples)
    pixels = decoded(data, value_range=(low, low + 255 * step))
    assert difference(pixels, shown(PICTURES["grey"])) <= (2 if dtype == "int8" else 0)
    assert_same(pixels, shown(PICTURES["grey"]))


@pytest.mark.parametrize("predictor", [2, 3])
def test_predictors_do_not_matter(predictor):
    samples = GREY.astype("float32" if predictor == 3 else "int16")
    image: Any = pyvips.Image.new_from_array(samples)
    kind = "float" if predictor == 3 else "horizontal"
    data = image.tiffsave_buffer(compression="lzw", predictor=kind)
    assert np.array_equal(decoded(data, value_range=(0, 255)), shown(PICTURES["grey"]))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("int8", "TIFF, 1 x 8 bit signed"),
        ("int16", "TIFF, 1 x 16 bit signed"),
        ("int32", "TIFF, 1 x 32 bit signed"),
        ("uint32", "TIFF, 1 x 32 bit"),
        ("float32", "TIFF, 1 x 32 bit float"),
    ],
)
def test_a_number_without_an_agreed_range_is_refused_with_the_option(dtype, words):
    low, step = NUMBERS[dtype]
    photos = [np.array(photo(WIDTH, HEIGHT, seed).convert("L")) for seed in range(3)]
    for grey in photos:
        samples = (low + step * grey.astype(np.float64)).astype(dtype)
        assert refusal(written(samples)) == f"{words}: set value_range=(low, high)"


def test_photos_of_floats_differ_once_they_have_a_range():
    photos = [np.array(photo(WIDTH, HEIGHT, seed).convert("L")) for seed in range(3)]
    vectors = [
        vector(decoded(written((grey / 255).astype("float32")), value_range=(0, 1)))
        for grey in photos
    ]
    plain = [vector(decoded(encode(Image.fromarray(grey)))) for grey in photos]
    for (a, b), (c, d) in zip(
        itertools.combinations(vectors, 2), itertools.combinations(plain, 2), strict=True
    ):
        assert cosine(a, b) == pytest.approx(cosine(c, d), abs=1e-6)


def test_values_outside_the_range_are_clipped_and_nan_is_black():
    samples = np.array([[np.nan, np.inf, -np.inf, 0, 1, 2, -1, 1.0999, 1e30]], np.float32)
    levels = decoded(written(samples), value_range=(0, 2))[0, :, 0]
    assert levels.tolist() == [0, 255, 0, 0, 128, 255, 0, 140, 255]
    wide = np.array([[0, 999, 1000, 1001, 2000, 2001, 65535]], np.uint16)
    assert decoded(written(wide), value_range=(1000, 2000))[0, :, 0].tolist() == [
        *(0, 0, 0, 0, 255, 255, 255)
    ]


def test_large_images_are_mapped_in_parts_without_a_seam():
    samples = np.arange(700 * 500, dtype=np.float32).reshape(700, 500)
    levels = decoded(written(samples), value_range=(0, 349_999))[:, :, 0]
    assert difference(levels, np.rint(samples.astype(np.float64) / 349_999 * 255)) == 0


@pytest.mark.parametrize(
    ("format", "mode"), [pair for pair in FORMATS_AND_MODES if pair[1] != "I;16"]
)
def test_a_range_does_not_touch_images_of_8_bits(format, mode):
    data = encode(of_mode(mode), format)
    assert np.array_equal(decoded(data, value_range=(50, 60)), decoded(data))


@by_picture
def test_a_range_has_the_full_depth_of_png(picture):
    data = png(1000 + picture.astype(np.uint32), 16)
    assert np.array_equal(decoded(data, value_range=(1000, 1255)), shown(picture))
    assert_same(decoded(data, value_range=(1000, 1255)), shown(picture))


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib", "predictor": True}, {"tile": (32, 32)}], ids=str
)
@pytest.mark.parametrize("extra", [None, "unassalpha", "unspecified"])
def test_a_range_has_the_full_depth_of_tiff(byte_order, options, extra):
    picture = PICTURES["RGBA" if extra else "RGB"]
    samples = picture.astype(np.uint16) + np.uint16(1000)
    extras: Any = {"extrasamples": [extra]} if extra else {}
    data = written(samples, byteorder=byte_order, **options, **extras)
    assert np.array_equal(decoded(data, value_range=(1000, 1255)), RGB)


def test_alpha_has_its_own_range():
    data = png(np.dstack([RGB.astype(np.uint32) + 1000, ALPHA.astype(np.uint32) * 257]), 16)
    pixels = decoded(data, value_range=(1000, 1255), background="#20c0f0")
    plain = encode(Image.fromarray(PICTURES["RGBA"]))
    assert np.array_equal(pixels, decoded(plain, background="#20c0f0"))


@by_picture
def test_full_range_keeps_the_high_byte(picture):
    samples = picture.astype(np.uint32) * 256 + 255 - picture
    assert np.array_equal(decoded(png(samples, 16)), shown(picture))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            written(
                np.moveaxis(RGB, 2, 0) * np.uint16(257), planarconfig="separate", photometric="rgb"
            ),
            "TIFF, 3 x 16 bit, planar",
        ),
        (
            written(PICTURES["RGBA"] * np.uint16(257), extrasamples=["assocalpha"]),
            "TIFF, 4 x 16 bit",
        ),
        (written(PICTURES["RGBA"] * np.uint16(257), photometric="separated"), "TIFF, 4 x 16 bit"),
    ],
    ids=["planar", "premultiplied", "CMYK"],
)
def test_layouts_read_by_high_byte_only_are_refused_with_a_range(data, words):
    assert decoded(data).shape == RGB.shape
    assert refusal(data, value_range=(0, 4095)).startswith(f"{words}: only the high 8 bits")


def test_heif_of_10_bits_is_refused_with_a_range():
    wide = (RGB.astype("<u2") * 257).tobytes()
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (WIDTH, HEIGHT), wide).save(file, quality=95, chroma=444)
    assert_same(decoded(file.getvalue()), RGB)
    assert "HEIF, 10 bit" in refusal(file.getvalue(), value_range=(0, 1023))


@pytest.mark.skipif(shutil.which("heif-enc") is None, reason="heif-enc of libheif is missing")
def test_avif_of_12_bits_is_refused_with_a_range(tmp_path):
    (tmp_path / "wide.png").write_bytes(png(RGB.astype(np.uint32) * 257, 16))
    command = ["heif-enc", "-A", "-b", "12", "-q", "95", "wide.png", "-o", "wide.avif"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    data = (tmp_path / "wide.avif").read_bytes()
    assert_same(decoded(data), RGB)
    assert "AVIF, 12 bit" in refusal(data, value_range=(0, 4095))


# How a PNG of 16 bits holds samples of fewer, as its standard says (section 12.4).
CONFORMING = {
    "zeros": lambda samples, bits: samples << (16 - bits),
    "repeated bits": lambda samples, bits: samples << (16 - bits) | samples >> (2 * bits - 16),
    "linear": lambda samples, bits: (samples * 65535 + (1 << bits - 1)) // ((1 << bits) - 1),
}


@by_picture
@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("how", CONFORMING)
@pytest.mark.parametrize("share", [1, 1 / 20], ids=["bright", "dark"])
def test_conforming_sbit_changes_nothing(picture, bits, how, share):
    samples = CONFORMING[how](scaled(picture * share, (1 << bits) - 1), bits)
    declared = chunk(b"sBIT", bytes([bits] * picture.shape[2]))
    assert np.array_equal(decoded(png(samples, 16, declared)), decoded(png(samples, 16)))


@by_picture
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_samples_in_the_low_bits_follow_sbit(picture, bits):
    samples = scaled(picture, (1 << bits) - 1)
    declared = png(samples, 16, chunk(b"sBIT", bytes([bits] * picture.shape[2])))
    assert difference(decoded(declared), shown(picture)) <= 1
    assert_same(decoded(declared), shown(picture))
    assert decoded(png(samples, 16)).max() < 70  # dark without the chunk, as ever
    background = {"background": "#20c0f0"}
    plain = encode(Image.fromarray(picture.squeeze()))
    assert difference(decoded(declared, **background), decoded(plain, **background)) <= 1


def test_alpha_may_have_its_own_sbit():
    samples = np.dstack([scaled(RGB, 4095), scaled(ALPHA, 65535)])
    declared = png(samples, 16, chunk(b"sBIT", bytes([12, 12, 12, 16])))
    plain = encode(Image.fromarray(PICTURES["RGBA"]))
    for options in ({}, {"background": "#20c0f0"}):
        assert difference(decoded(declared, **options), decoded(plain, **options)) <= 1


@by_picture
def test_a_range_wins_over_sbit(picture):
    samples = scaled(picture, 4095)
    declared = png(samples, 16, chunk(b"sBIT", bytes([12] * picture.shape[2])))
    assert np.array_equal(
        decoded(declared, value_range=(0, 65535)), decoded(png(samples, 16), value_range=(0, 65535))
    )


@pytest.mark.parametrize("most", [1023, 4095, 16383])
@pytest.mark.parametrize("kind", ["H", "I"])
@pytest.mark.parametrize("picture", ["grey", "RGB"])
def test_tiffs_follow_the_maximum_that_they_declare(picture, most, kind):
    samples = scaled(PICTURES[picture], most).astype(np.uint16).squeeze()
    value = most if picture == "grey" else (most,) * 3
    data = written(samples, {MAX_SAMPLE: (kind, value)})
    assert difference(decoded(data), shown(PICTURES[picture])) <= 1
    assert_same(decoded(data), shown(PICTURES[picture]))
    assert decoded(written(samples)).max() < 70
    with_range = decoded(data, value_range=(0, 65535))
    assert np.array_equal(with_range, decoded(written(samples), value_range=(0, 65535)))


@pytest.mark.parametrize("most", [4_000_000, 65535, 40_000, 4095, 100, 0])
@pytest.mark.parametrize("picture", ["grey", "RGB"])
def test_a_maximum_that_pixels_exceed_or_that_is_full_changes_nothing(picture, most):
    samples = (PICTURES[picture].astype(np.uint16) * 257).squeeze()
    value = most if picture == "grey" else (most,) * 3
    data = written(samples, {MAX_SAMPLE: ("I", value)})
    assert np.array_equal(decoded(data), decoded(written(samples)))


def test_the_largest_value_of_a_picture_stands_for_its_depth():
    samples = scaled(PICTURES["grey"], 4095).astype(np.uint16).squeeze()
    data = written(samples, {MAX_SAMPLE: ("H", int(samples.max()))})
    assert samples.max() < 4095
    assert np.array_equal(decoded(data), decoded(written(samples, {MAX_SAMPLE: ("H", 4095)})))


@pytest.mark.parametrize(
    ("dtype", "tags"),
    [
        ("float32", {SMIN_SAMPLE: ("f", -3.0), SMAX_SAMPLE: ("f", -3 + 255 / 64)}),
        ("int16", {SMIN_SAMPLE: ("h", -20_000), SMAX_SAMPLE: ("h", -20_000 + 255 * 150)}),
        ("uint32", {SMIN_SAMPLE: ("I", 2_200_000_000), SMAX_SAMPLE: ("I", 4_240_000_000)}),
        ("int8", {SMIN_SAMPLE: ("b", -100), SMAX_SAMPLE: ("b", 27)}),
    ],
)
def test_numbers_follow_the_range_that_they_declare(dtype, tags):
    low, step = NUMBERS[dtype]
    data = written((low + step * GREY.astype(np.float64)).astype(dtype), tags)
    assert difference(decoded(data), shown(PICTURES["grey"])) <= 2
    assert_same(decoded(data), shown(PICTURES["grey"]))
    given = decoded(data, value_range=(low, low + 500 * step))
    assert given.max() < 150


@pytest.mark.parametrize(
    "tags",
    [
        {SMIN_SAMPLE: ("f", 1.0), SMAX_SAMPLE: ("f", 1.0)},
        {SMIN_SAMPLE: ("f", 1.0), SMAX_SAMPLE: ("f", 0.0)},
        {SMIN_SAMPLE: ("f", float("nan")), SMAX_SAMPLE: ("f", 1.0)},
        {SMIN_SAMPLE: ("f", 0.0), SMAX_SAMPLE: ("f", float("inf"))},
        {SMAX_SAMPLE: ("s", "text")},
        {MAX_SAMPLE: ("H", 4095)},
    ],
    ids=["empty", "falling", "nan", "infinite", "text", "of integers"],
)
def test_a_declared_range_that_makes_no_sense_is_none(tags):
    assert "set value_range" in refusal(written((GREY / 255).astype("float32"), tags))


@pytest.mark.parametrize("options", [{}, {"value_range": (0, 4095)}], ids=str)
def test_12_bits_are_scaled(options):
    samples = scaled(PICTURES["grey"], 4095).reshape(-1, 2)
    pairs = samples[:, 0] << 12 | samples[:, 1]
    packed = np.stack([pairs >> 16, pairs >> 8 & 255, pairs & 255], axis=1).astype(np.uint8)
    tags: Any = {256: WIDTH, 257: HEIGHT, 258: 12, 259: 1, 262: 1, 277: 1, 278: HEIGHT}
    data = tiff({tag: ("H", [value]) for tag, value in tags.items()}, [packed.tobytes()])
    assert difference(decoded(data, **options), shown(PICTURES["grey"])) == 0
    if IMAGEMAGICK is not None:
        assert_same(decoded(data, **options), by_imagemagick(data, "tiff", "white"))


@pytest.mark.parametrize(
    ("bits", "compression"),
    [
        *itertools.product((1, 4, 8, 16), ("none", "packbits")),
        *itertools.product((8, 16), ("deflate", "lzw")),
        (1, "ccittfax4"),
    ],
)
@pytest.mark.parametrize("tile", [False, True], ids=["strips", "tiles"])
def test_0_may_be_white(bits, compression, tile):
    most = 2 ** min(bits, 8) - 1
    levels = (scaled(GREY, most) * 255 // most).astype(np.uint8)
    samples = levels * np.uint16(257) if bits == 16 else levels
    interpretation = "grey16" if bits == 16 else "b-w"
    image: Any = pyvips.Image.new_from_array(samples).copy(interpretation=interpretation)
    depth = {"bitdepth": bits} if bits < 8 else {}
    data = image.tiffsave_buffer(compression=compression, tile=tile, miniswhite=True, **depth)
    page: Any = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    assert page.tags["PhotometricInterpretation"].value == 0
    if bits >= 8 and compression == "none":
        assert np.array_equal(2**bits - 1 - by_tifffile(data), samples)
    assert np.array_equal(decoded(data), by_vips(data))
    assert_same(decoded(data), shown(levels[:, :, None]))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_where_0_is_white_low_is_white(dtype):
    data = written(GREY.astype(dtype), photometric="miniswhite")
    pixels = decoded(data, value_range=(0, 255))
    assert np.array_equal(pixels, 255 - shown(PICTURES["grey"]))


def test_where_0_is_white_the_declared_maximum_is_black():
    samples = scaled(PICTURES["grey"], 4095).astype(np.uint16).squeeze()
    data = written(samples, {MAX_SAMPLE: ("H", 4095)}, photometric="miniswhite")
    assert difference(decoded(data), 255 - shown(PICTURES["grey"])) <= 1


@needs_imagemagick
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_jpeg_2000_of_more_than_8_bits(bits):
    command = [str(IMAGEMAGICK), "png:-", "-depth", str(bits), "-quality", "100", "jp2:-"]
    source = png(GREY[:, :, None].astype(np.uint32) * 257, 16)
    data = subprocess.run(command, input=source, capture_output=True, check=True).stdout
    assert difference(decoded(data), shown(PICTURES["grey"])) <= 1
    most = 2**bits - 1
    assert difference(decoded(data, value_range=(0, most)), shown(PICTURES["grey"])) <= 1
    half = decoded(data, value_range=(0, 2 * most + 1)).astype(int)
    assert difference(half, shown(PICTURES["grey"]) // 2) <= 1
    assert_same(decoded(data), by_imagemagick(data, "jp2", "white"))


@needs_imagemagick
def test_jpeg_2000_in_colours_of_16_bits_is_refused():
    command = [str(IMAGEMAGICK), "png:-", "-depth", "16", "-quality", "100", "jp2:-"]
    source = png(RGB.astype(np.uint32) * 257, 16)
    data = subprocess.run(command, input=source, capture_output=True, check=True).stdout
    assert by_imagemagick(data, "jp2", "white").max() == 255  # which Pillow turns into 0
    for options in ({}, {"value_range": (0, 65535)}):
        assert refusal(data, **options) == "JPEG2000, 3 x 16 bit"


def test_signed_jpeg_2000_needs_a_range():
    file = bytearray(encode(Image.fromarray(GREY.astype(np.uint16) * np.uint16(200))))
    data = bytearray(encode(Image.open(io.BytesIO(file)), "JPEG2000", no_jp2=True))
    size = data.index(b"\xff\x51") + 40  # Ssiz, ISO/IEC 15444-1, A.5.1
    assert data[size] == 15
    data[size] |= 0x80  # then samples are stored from -32768 on
    assert "JPEG2000, 1 x 16 bit signed: set value_range" in refusal(bytes(data))
    low = -32768
    pixels = decoded(bytes(data), value_range=(low, low + 255 * 200))
    assert np.array_equal(pixels, shown(PICTURES["grey"]))
