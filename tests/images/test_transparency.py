from __future__ import annotations

import io
import itertools
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from imagevec import ImageError, Preprocessing
from imagevec.images.decode import Pixels
from imagevec.images.prepare import load
from imagevec.images.values import Value
from imagevec.options import FORMATS, OTHER_FORMATS
from tests.helpers import pipeline
from tests.helpers.images import FORMATS_AND_MODES, cosine, encode, of_mode, opened, photo
from tests.helpers.judges import (
    SAME,
    assert_same,
    by_imagemagick,
    by_vips,
    needs_imagemagick,
    vector,
)
from tests.helpers.pipeline import execution_options, pixels_of
from tests.helpers.png import chunk, png
from tests.helpers.structs import BGR, BGRA, GREY, image_struct

WIDTH, HEIGHT = 80, 64
BACKGROUND = "#20c0f0"
COLOUR = (0x20, 0xC0, 0xF0)
RGB = np.array(photo(WIDTH, HEIGHT))
GREY_3 = np.repeat(np.array(photo(WIDTH, HEIGHT).convert("L"))[:, :, None], 3, axis=2)
ALPHA = np.array(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
ALPHA[:10], ALPHA[-10:] = 0, 255


class Kind(NamedTuple):
    """A file and what it shows.

    Attributes:
        data: The file.
        format: Its format.
        colours: uint8 ``(H, W, 3)``.
        alpha: ``(H, W)``, 0 to 255.
        tolerance: By how much a lossless decoder may differ; ``None`` if the file is lossy.
    """

    data: bytes
    format: str
    colours: Pixels
    alpha: np.ndarray
    tolerance: int | None = 0


def decoded(data: bytes, **options: Any) -> Pixels:
    return pipeline.decoded(data, formats=(*FORMATS, *OTHER_FORMATS), **options).pixels


def over(colours: Pixels, alpha: np.ndarray, colour: tuple[int, int, int] = COLOUR) -> Pixels:
    share = alpha[:, :, None] / 255
    return np.rint(colours * share + np.array(colour) * (1 - share)).astype(np.uint8)


def with_alpha(colours: Pixels) -> np.ndarray:
    """RGB or, if the channels are equal, grey, with alpha: uint8 ``(H, W, 2 or 4)``."""
    is_grey = colours is GREY_3
    return np.dstack([colours[:, :, 0] if is_grey else colours, ALPHA])


def palette() -> Image.Image:
    return photo(WIDTH, HEIGHT).quantize(64)


def opaque_but(image: Image.Image, index: int) -> np.ndarray:
    return np.where(np.asarray(image) == index, 0, 255)


def with_key(colours: Pixels, bits: int) -> Kind:
    """A PNG with one transparent colour. At 16 bits, others differ from it by the low byte only."""
    channels = 1 if colours is GREY_3 else 3
    most = 2**bits - 1
    samples = (colours[:, :, :channels].astype(np.uint32) // 64 * 85 * most + 127) // 255
    shown = np.broadcast_to((samples * 255 // most).astype(np.uint8), colours.shape)
    values, counts = np.unique(samples.reshape(-1, channels), axis=0, return_counts=True)
    key = values[counts.argmax()]
    if bits == 16:
        samples[::2] ^= 1
    alpha = np.where((samples == key).all(axis=2), 0, 255)
    unused = 0 if bits in (1, 16) else 0xA500  # bits above those of a sample
    trns = chunk(b"tRNS", struct.pack(f">{channels}H", *(key | unused)))
    assert 0 < (alpha == 0).sum() < alpha.size
    return Kind(png(samples, bits, trns), "PNG", shown, alpha)


def premultiplied(pixels: np.ndarray) -> np.ndarray:
    colours = np.rint(pixels[:, :, :-1] * (pixels[:, :, -1:] / 255))
    return np.dstack([colours, pixels[:, :, -1]]).astype(np.uint8)


def tiff(colours: Pixels, extra: str = "unassalpha", depth: int = 8, **options: Any) -> Kind:
    pixels = with_alpha(colours)
    if extra == "assocalpha":
        pixels = premultiplied(pixels)
    samples = pixels * np.uint16(257) if depth == 16 else pixels
    if options.get("planarconfig") == "separate":
        samples = np.moveaxis(samples, 2, 0).copy()
    file = io.BytesIO()
    kind = "minisblack" if colours is GREY_3 else "rgb"
    tifffile.imwrite(file, samples, photometric=kind, extrasamples=[extra], **options)
    alpha = np.full_like(ALPHA, 255) if extra == "unspecified" else ALPHA
    return Kind(file.getvalue(), "TIFF", colours, alpha, 1 if extra == "assocalpha" else 0)


def bmp(masks: bool, alpha: np.ndarray = ALPHA) -> Kind:
    """A BMP of 32 bits with the header BITMAPV4HEADER, or BITMAPINFOHEADER without masks."""
    pixels = np.dstack([RGB[:, :, ::-1], alpha])[::-1].tobytes()
    size, compression = (108, 3) if masks else (40, 0)
    header = struct.pack("<IiiHHII", size, WIDTH, HEIGHT, 1, 32, compression, len(pixels))
    header += struct.pack("<iiII", 2835, 2835, 0, 0)
    if masks:
        header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    start = 14 + len(header)
    file = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + pixels
    has_alpha = masks and alpha.any()
    return Kind(file, "BMP", RGB, alpha if has_alpha else np.full_like(ALPHA, 255))


def small_gif(transparency: int | None) -> Kind:
    """A GIF whose first frame is smaller than the picture."""
    image = palette()
    frame = image.crop((0, 0, 40, 32))
    options = {} if transparency is None else {"transparency": transparency}
    file = bytearray(encode(frame, "GIF", optimize=False, **options))
    file[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    descriptor = file.index(b"\x2c\0\0\0\0")
    file[descriptor + 1 : descriptor + 5] = struct.pack("<HH", 10, 8)
    colours, alpha = np.zeros_like(RGB), np.zeros((HEIGHT, WIDTH), int)
    colours[8:40, 10:50] = pixels_of(frame.convert("RGB"))
    alpha[8:40, 10:50] = 255 if transparency is None else opaque_but(frame, transparency)
    return Kind(bytes(file), "GIF", colours, alpha)


def kinds() -> dict[str, Kind]:
    rgba, la = Image.fromarray(with_alpha(RGB)), Image.fromarray(with_alpha(GREY_3))
    indexed = palette()
    shown = pixels_of(indexed.convert("RGB"))
    alphas = bytes(range(0, 256, 4))
    alpha_of_index = np.frombuffer(alphas, np.uint8)[np.asarray(indexed)]
    index = int(np.bincount(np.asarray(indexed).ravel()).argmax())
    return {
        "PNG, RGBA": Kind(encode(rgba), "PNG", RGB, ALPHA),
        "PNG, LA": Kind(encode(la), "PNG", GREY_3, ALPHA),
        "PNG, palette": Kind(encode(indexed, transparency=alphas), "PNG", shown, alpha_of_index),
        "PNG, one of a palette": Kind(
            encode(indexed, transparency=index), "PNG", shown, opaque_but(indexed, index)
        ),
        **{f"PNG, grey key, {bits} bit": with_key(GREY_3, bits) for bits in (1, 2, 4, 8, 16)},
        **{f"PNG, RGB key, {bits} bit": with_key(RGB, bits) for bits in (8, 16)},
        "PNG, RGBA, 16 bit": Kind(png(with_alpha(RGB) * np.uint32(257), 16), "PNG", RGB, ALPHA),
        "PNG, LA, 16 bit": Kind(png(with_alpha(GREY_3) * np.uint32(257), 16), "PNG", GREY_3, ALPHA),
        "WebP": Kind(encode(rgba, "WEBP", lossless=True, exact=True), "WEBP", RGB, ALPHA),
        "WebP, lossy": Kind(encode(rgba, "WEBP", quality=95), "WEBP", RGB, ALPHA, None),
        "AVIF": Kind(encode(rgba, "AVIF", quality=95), "AVIF", RGB, ALPHA, None),
        "HEIF": Kind(encode(rgba, "HEIF", quality=95), "HEIF", RGB, ALPHA, None),
        "GIF": Kind(
            encode(indexed, "GIF", transparency=index), "GIF", shown, opaque_but(indexed, index)
        ),
        "GIF, small frame": small_gif(None),
        "GIF, small frame, transparent": small_gif(5),
        "TIFF, RGBA": tiff(RGB),
        "TIFF, RGBA, big-endian": tiff(RGB, byteorder=">"),
        "TIFF, RGBA, 16 bit": tiff(RGB, depth=16),
        "TIFF, RGBA, planar": tiff(RGB, planarconfig="separate"),
        "TIFF, RGBA, 16 bit, planar": tiff(RGB, depth=16, planarconfig="separate"),
        "TIFF, LA": tiff(GREY_3, compression="zlib"),
        "TIFF, RGBa": tiff(RGB, "assocalpha"),
        "TIFF, RGBa, planar": tiff(RGB, "assocalpha", planarconfig="separate"),
        "TIFF, RGBa, 16 bit": tiff(RGB, "assocalpha", depth=16, compression="zlib"),
        "TIFF, La": tiff(GREY_3, "assocalpha"),
        "BMP, masks": bmp(True),
        "ICO": Kind(encode(rgba, "ICO", sizes=[rgba.size]), "ICO", RGB, ALPHA),
        "JPEG 2000": Kind(encode(rgba, "JPEG2000"), "JPEG2000", RGB, ALPHA),
        "JPEG 2000, LA": Kind(encode(la, "JPEG2000"), "JPEG2000", GREY_3, ALPHA),
    }


KINDS = kinds()
MISREAD_BY_PILLOW = (
    "PNG, grey key, 16 bit",  # which it clips to white
    "TIFF, RGBA, 16 bit, planar",
    "TIFF, RGBa, planar",
    "TIFF, La",
)
by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@by_kind
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_transparent_pixels_are_put_over_the_colour(kind):
    pixels = decoded(kind.data, background=BACKGROUND)
    expected = over(kind.colours, kind.alpha)
    assert_same(pixels, expected)
    if kind.tolerance is not None:
        assert np.abs(pixels.astype(int) - expected).max() <= kind.tolerance
    assert cosine(pixels.ravel(), decoded(kind.data).ravel()) < SAME  # alpha matters here


@pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if kind.format in ("PNG", "WEBP", "TIFF")]
)
def test_libvips_shows_the_same(name):
    data = KINDS[name].data
    assert_same(decoded(data, background=BACKGROUND), by_vips(data, COLOUR))


@needs_imagemagick
@pytest.mark.parametrize(
    "name",
    ["PNG, RGB key, 16 bit", "GIF, small frame", "TIFF, La", "BMP, masks", "ICO", "JPEG 2000"],
)
def test_imagemagick_shows_the_same(name):
    kind = KINDS[name]
    format = {"JPEG2000": "jp2"}.get(kind.format, kind.format.lower())
    judged = by_imagemagick(kind.data, format, BACKGROUND)
    assert_same(decoded(kind.data, background=BACKGROUND), judged)


@pytest.mark.parametrize(
    "name",
    [name for name in KINDS if name not in MISREAD_BY_PILLOW],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_without_a_colour_alpha_is_dropped_as_pillow_does(name):
    data = KINDS[name].data
    image = opened(data)
    assert np.array_equal(decoded(data), pixels_of(image.convert("RGB")))


@pytest.mark.parametrize("colour", ["#000000", "#ffffff", "#20c0f0", "#010203"])
def test_the_result_is_rounded_right_and_as_by_pillow(colour):
    colours, alpha = np.divmod(np.arange(65536, dtype=np.int64).reshape(256, 256), 256)
    image = Image.fromarray(np.dstack([colours, colours, colours, alpha]).astype(np.uint8))
    pixels = decoded(encode(image), background=colour)
    levels = tuple(bytes.fromhex(colour[1:]))
    exact = (
        colours[:, :, None] * alpha[:, :, None] + np.array(levels) * (255 - alpha[:, :, None])
    ) / 255
    assert np.abs(pixels - exact).max() <= 0.5
    canvas = Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")
    assert np.abs(pixels.astype(int) - pixels_of(canvas)).max() <= 1


@pytest.mark.parametrize(
    "kind",
    [
        tiff(RGB, "unspecified"),
        tiff(RGB, "unspecified", depth=16),
        bmp(False),
        bmp(True, ALPHA * 0),
    ],
    ids=["TIFF, RGBX", "TIFF, RGBX, 16 bit", "BMP without masks", "BMP of empty alpha"],
)
def test_a_channel_that_is_not_alpha_does_not_matter(kind):
    assert np.array_equal(decoded(kind.data, background=BACKGROUND), RGB)


@pytest.mark.parametrize(
    ("format", "mode"), [pair for pair in FORMATS_AND_MODES if pair[1] not in ("LA", "RGBA")]
)
def test_an_opaque_image_does_not_depend_on_the_colour(format, mode):
    data = encode(of_mode(mode), format)
    assert np.array_equal(decoded(data, background=BACKGROUND), decoded(data))


def test_planar_grey_with_alpha_is_refused_only_if_alpha_is_needed():
    planar = tiff(GREY_3, planarconfig="separate", compression="zlib").data
    assert np.array_equal(decoded(planar), GREY_3)
    with pytest.raises(ImageError, match="TIFF, 2 x 8 bit, planar") as error:
        decoded(planar, background=BACKGROUND)
    assert error.value.code == "unsupported_format"


def test_premultiplied_pixels_are_divided_by_alpha_without_a_colour():
    for colours in (RGB, GREY_3):
        pixels = decoded(tiff(colours, "assocalpha").data)
        opaque = ALPHA > 100
        assert np.abs(pixels[opaque].astype(int) - colours[opaque]).max() <= 2
        assert (pixels[ALPHA == 0] == 0).all()


def test_an_image_struct_is_put_over_the_colour():
    image = Image.fromarray(with_alpha(RGB))
    loaded = load(
        Value(image_struct(image, BGRA)), execution_options(), Preprocessing(background=BACKGROUND)
    )
    assert np.array_equal(loaded.pixels, decoded(encode(image), background=BACKGROUND))
    for mode, name in ((BGR, "RGB"), (GREY, "L")):
        struct_of_mode = Value(image_struct(image.convert(name), mode))
        plain = load(struct_of_mode, execution_options(), Preprocessing())
        coloured = load(struct_of_mode, execution_options(), Preprocessing(background=BACKGROUND))
        assert np.array_equal(plain.pixels, coloured.pixels)


def drawings() -> list[Image.Image]:
    """Six drawings in black on transparent, such as icons and logos."""
    images = [Image.new("RGBA", (64, 64), (0, 0, 0, 0)) for _ in range(6)]
    draw: list[Any] = [ImageDraw.Draw(image) for image in images]
    draw[0].ellipse((8, 8, 56, 56), outline="black", width=8)
    draw[1].rectangle((28, 4, 36, 60), fill="black")
    draw[2].polygon([(32, 4), (60, 60), (4, 60)], fill="black")
    draw[3].line((4, 4, 60, 60), fill="black", width=6)
    draw[4].rectangle((4, 40, 60, 60), fill="black")
    for x, y in itertools.product(range(4, 60, 14), repeat=2):
        draw[5].ellipse((x, y, x + 7, y + 7), fill="black")
    return images


def pairwise(**options: Any) -> list[float]:
    vectors = [vector(decoded(encode(image), **options)) for image in drawings()]
    return [float(cosine(a, b)) for a, b in itertools.combinations(vectors, 2)]


def test_drawings_on_transparent_are_equal_until_a_colour_is_given():
    assert min(pairwise()) > 1 - 1e-6
    assert max(pairwise(background="#ffffff")) < 0.95
