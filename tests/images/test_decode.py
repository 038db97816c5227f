from __future__ import annotations

import struct
from errno import EMFILE, ENFILE, ENOMEM, ENOSPC
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from imagevec import ImageError
from imagevec.errors import IMAGE_ERROR_CODES
from imagevec.images.decode import Pixels
from imagevec.options import DEFAULTS, FORMATS
from tests.helpers.images import (
    FORMATS_AND_MODES,
    MODES_OF_FORMAT,
    encode,
    of_mode,
    opened,
    photo,
    png_header,
    tiff_16_bit,
)
from tests.helpers.pipeline import decoded, pixels_of

ORIENTATION = 0x0112

SIGNATURES = {
    "JPEG": b"\xff\xd8\xff\xe0",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "WEBP": b"RIFF\x00\x10\x00\x00WEBPVP8 ",
    "GIF": b"GIF89a",
    "BMP": b"BM",
    "TIFF": b"II*\x00",
    "AVIF": b"\x00\x00\x00\x20ftypavif",
    "HEIF": b"\x00\x00\x00\x20ftypheic",
}


def refused(data: bytes, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    assert error.value.code in IMAGE_ERROR_CODES
    return error.value


def verdict(data: bytes) -> str:
    """``"decoded"``, or the code of the error. No other exception is let through."""
    try:
        decoded(data)
    except ImageError as error:
        assert error.code in IMAGE_ERROR_CODES
        return error.code
    return "decoded"


def same_pixels(data: bytes, expected: Image.Image) -> bool:
    return np.array_equal(decoded(data).pixels, pixels_of(expected))


@pytest.mark.parametrize(
    ("format", "mode"), [pair for pair in FORMATS_AND_MODES if pair[1] != "I;16"]
)
def test_every_mode_becomes_rgb_as_by_pillow(format, mode):
    data = encode(of_mode(mode), format)
    image = decoded(data)
    assert image.pixels.dtype == np.uint8
    assert (image.width, image.height) == (80, 60)
    assert same_pixels(data, opened(data).convert("RGB"))


def test_the_modes_of_the_table_are_the_modes_that_are_read():
    read = {opened(encode(of_mode(mode), format)).mode for format, mode in FORMATS_AND_MODES}
    assert read == {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"}


def test_alpha_is_dropped_not_blended():
    clear_red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert same_pixels(encode(clear_red), Image.new("RGB", (8, 8), (255, 0, 0)))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_a_palette_with_transparent_colours_keeps_them():
    image = photo().convert("P")
    data = encode(image, "PNG", transparency=bytes(range(256)))
    assert same_pixels(data, image.convert("RGB"))


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"quality": 10}]
)
def test_jpeg_variants_are_as_by_pillow(options):
    data = encode(photo(81, 61), "JPEG", **options)
    assert same_pixels(data, opened(data).convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(photo(), format, exif=exif)
    upright = ImageOps.exif_transpose(opened(data)).convert("RGB")
    image = decoded(data)
    assert (image.width, image.height) == upright.size
    assert np.array_equal(image.pixels, pixels_of(upright))
    assert image.pixels.flags.c_contiguous
    assert orientation == 1 or not np.array_equal(image.pixels, decoded(encode(photo())).pixels)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(photo(), "JPEG", exif=exif)
    assert same_pixels(data, opened(data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_a_broken_exif_block_does_not_matter():
    data = encode(
        photo(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01" * 9
    )
    assert same_pixels(data, opened(data))


def grey_ramp() -> np.ndarray:
    """Every 16-bit value, ``(256, 256)``."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(grey_ramp())),
        tiff_16_bit(grey_ramp(), "<"),
        tiff_16_bit(grey_ramp(), ">"),
        encode(Image.fromarray(grey_ramp()), "TIFF", compression="tiff_lzw"),
    ],
    ids=["png", "tiff little-endian", "tiff big-endian", "tiff compressed"],
)
def test_16_bits_are_scaled_not_clipped(data):
    assert opened(data).mode.startswith("I;16")
    grey = (grey_ramp() // 256).astype(np.uint8)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(decoded(data).pixels, expected)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_is_taken(format):
    frames = [photo(seed=seed) for seed in (1, 2, 3)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    image: Any = opened(data)
    assert image.n_frames == 3
    assert same_pixels(data, opened(data).convert("RGB"))
    assert not same_pixels(data, opened(encode(frames[1], format)).convert("RGB"))


def test_a_jpeg_with_a_second_picture_is_a_jpeg():
    data = encode(photo(), "MPO", save_all=True, append_images=[photo(seed=2)])
    assert opened(data).format == "MPO"
    assert same_pixels(data, opened(data))


@pytest.mark.parametrize("format", FORMATS)
def test_the_pixel_limit_is_exact(format):
    data = encode(photo(40, 30), format)
    assert decoded(data, max_pixels=1200).width == 40
    error = refused(data, max_pixels=1199)
    assert error.code == "too_large"
    assert "40x30" in error.detail


@pytest.mark.parametrize("format", FORMATS)
def test_no_pixel_is_decoded_above_the_limit(format, monkeypatch):
    data = encode(photo(40, 30), format)

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr("simplejpeg.decode_jpeg", load)
    assert refused(data, max_pixels=1199).code == "too_large"


def test_the_header_alone_tells_that_an_image_is_too_large():
    bomb = png_header(60_000, 60_000)
    assert len(bomb) < 100
    assert refused(bomb).code == "too_large"
    assert refused(png_header(40, 30), max_pixels=1199).code == "too_large"
    assert refused(png_header(40, 30), max_pixels=1200).code == "truncated"


def test_the_limit_that_is_named_is_max_pixels_and_not_pillows():
    error = refused(png_header(20_000, 10_000))
    assert error.code == "too_large"
    assert "max_pixels=89478485" in error.detail
    assert "200000000 pixels" in error.detail
    assert str(2 * DEFAULTS["max_pixels"]) not in error.detail
    assert "decompression bomb" not in error.detail


def test_the_limit_may_be_above_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(photo())
    assert decoded(data, max_pixels=4800).width == 80
    assert refused(data, max_pixels=4799).code == "too_large"


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "EPS", "PDF", "PCX", "JPEG2000"])
def test_formats_that_are_not_listed_are_refused(format):
    assert refused(encode(photo(), format)).code == "unsupported_format"


@pytest.mark.parametrize(
    "data", [b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x00" * 64, b"%PDF-1.7"]
)
def test_what_is_no_image_is_refused(data):
    assert refused(data).code == "unsupported_format"


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_can_be_taken_off_the_list(format):
    data = encode(photo(), format)
    others = tuple(name for name in FORMATS if name != format)
    assert decoded(data, formats=(format,)).width == 80
    error = refused(data, formats=others)
    assert error.code == "unsupported_format"
    assert format in error.detail


def test_no_bytes_are_an_empty_file():
    assert refused(b"").code == "empty"


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_file_is_an_image_error_wherever_it_is_cut(format):
    data = encode(photo(40, 30), format)
    for length in {*range(0, len(data), 1 + len(data) // 200), *range(len(data) - 8, len(data))}:
        verdict(data[:length])
    assert verdict(data) == "decoded"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}], ids=str)
def test_a_cut_jpeg_is_never_decoded(options):
    data = encode(photo(40, 30), "JPEG", **options)
    scan = data.index(b"\xff\xda")
    decoded_lengths = [n for n in range(1, len(data)) if verdict(data[:n]) == "decoded"]
    assert [n for n in decoded_lengths if n < len(data) - 4] == []
    assert {verdict(data[:n]) for n in range(scan + 20, len(data) - 4)} == {"truncated"}


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_file_without_its_second_half_is_truncated(format):
    data = encode(photo(), format)
    assert verdict(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("format", FORMATS)
def test_garbage_after_a_signature_is_an_image_error(format):
    rng = np.random.default_rng(0)
    for size in (0, 1, 4, 20, 100, 1000):
        for _ in range(5):
            assert verdict(SIGNATURES[format] + rng.bytes(size)) in (
                "corrupt",
                "truncated",
                "too_large",
            )


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bytes_are_at_worst_an_image_error(format):
    data = encode(photo(40, 30), format)
    rng = np.random.default_rng(0)
    for end in (64, 256, len(data)):
        for _ in range(30):
            broken = bytearray(data)
            for position in rng.integers(0, min(end, len(data)), 3):
                broken[position] = rng.integers(256)
            verdict(bytes(broken))


def by_pillow(data: bytes) -> Pixels | None:
    """The pixels of a JPEG, upright; ``None`` where Pillow refuses it."""
    try:
        return pixels_of(ImageOps.exif_transpose(opened(data)).convert("RGB"))
    except Exception:
        return None


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_a_damaged_jpeg_is_what_it_is_to_pillow(mode, options):
    data = encode(of_mode(mode, 97, 53), "JPEG", **options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(2, len(data))] = rng.integers(256)
        begin = rng.integers(2, len(data))
        del broken[begin : begin + rng.integers(0, 3)]
        expected = by_pillow(bytes(broken))
        if expected is None:
            assert verdict(bytes(broken)) != "decoded"
        else:
            assert np.array_equal(decoded(bytes(broken)).pixels, expected)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_side_of_no_pixels_is_an_image_error(size):
    assert refused(png_header(*size)).code in ("corrupt", "unsupported_format")


@pytest.mark.parametrize(
    "error",
    [
        TypeError,
        ValueError,
        SyntaxError,
        NotImplementedError,
        IndexError,
        KeyError,
        struct.error,
        OSError,
        OverflowError,
        RecursionError,
        Image.DecompressionBombError,
    ],
)
def test_whatever_a_decoder_raises_is_an_image_error(error, monkeypatch):
    def load(image: Image.Image) -> None:
        raise error("from a decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    image_error = refused(encode(photo()))
    assert isinstance(image_error.__cause__, error)
    assert "from a decoder" in image_error.detail


@pytest.mark.parametrize(
    "error", [MemoryError(), *(OSError(code, "") for code in (ENOMEM, EMFILE, ENFILE, ENOSPC))]
)
@pytest.mark.parametrize("method", ["load", "getexif"])
def test_lack_of_resources_is_not_an_image_error(error, method, monkeypatch):
    def fail(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, method, fail)
    with pytest.raises(type(error)):
        decoded(encode(photo()))


def test_the_reason_is_kept_for_a_person():
    data = encode(photo(), "JPEG")
    assert "truncated" in str(refused(data[: len(data) // 2]))
    assert "b'no image'" in refused(b"no image").detail


@pytest.mark.parametrize("mode", MODES_OF_FORMAT["JPEG"])
def test_a_scaled_jpeg_keeps_the_sides_that_are_asked_for(mode):
    data = encode(of_mode(mode, 800, 600), "JPEG")
    image = decoded(data, min_side=100)
    assert image.pixels.shape == (150, 200, 3)
    assert (image.width, image.height) == (800, 600)
    assert decoded(data, min_side=500).pixels.shape == (600, 800, 3)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "JPEG"])
def test_what_is_no_jpeg_is_not_scaled(format):
    data = encode(photo(400, 300), format)
    assert np.array_equal(decoded(data, min_side=20).pixels, decoded(data).pixels)


def test_a_scaled_jpeg_is_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = decoded(encode(photo(800, 600), "JPEG", exif=exif), min_side=100)
    assert image.pixels.shape == (200, 150, 3)
    assert (image.width, image.height) == (600, 800)
