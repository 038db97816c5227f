"""Truncated files: ``truncated="accept"`` takes the pixels that they still have."""

from __future__ import annotations

import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pyvips
import simplejpeg
import tifffile
from PIL import Image, ImageFile

from imagevec import ImageError, Preprocessing
from imagevec.images.decode import DecodedImage
from tests.helpers.images import FORMATS_AND_MODES, encode, of_mode, photo
from tests.helpers.pipeline import decoded, mean_engine, rows, series, small_row, stream
from tests.images.test_jpeg import JPEGS, SCAN, by_djpeg, markers, needs_djpeg
from tests.images.test_png import BAD, with_chunks
from tests.test_box_stream import box, of_boxes

SIZE = (120, 90)


def accepted(data: bytes, **options: object) -> DecodedImage:
    return decoded(data, truncated="accept", **options)


def refused(data: bytes, **options: object) -> str:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    return error.value.code


def rows_that_equal(image: DecodedImage, whole: DecodedImage, order: int) -> int:
    """The number of equal rows before the first that differs, in the order of the file."""
    assert image.pixels.shape == whole.pixels.shape
    differs = (image.pixels != whole.pixels).any((1, 2))[::order]
    return int(differs.argmax()) if differs.any() else len(differs)


def compressed_tiff(dtype: type[np.unsignedinteger[Any]], **options: Any) -> bytes:
    """A TIFF whose directory comes first, unlike those of Pillow and libtiff."""
    file = io.BytesIO()
    samples = np.asarray(photo(*SIZE)).astype(int) * np.iinfo(dtype).max // 255
    tifffile.imwrite(file, samples.astype(dtype), photometric="rgb", compression="zlib", **options)
    return file.getvalue()


def interlaced() -> bytes:
    return bytes(
        pyvips.Image.new_from_array(np.asarray(photo(*SIZE))).pngsave_buffer(interlace=True)
    )


IN_PART = {
    **{
        f"{format} {mode}": encode(of_mode(mode, *SIZE), format)
        for format, mode in FORMATS_AND_MODES
        if format in ("JPEG", "PNG", "GIF", "BMP", "TIFF")
    },
    "PNG with a broken text": with_chunks(encode(photo(*SIZE)), BAD),
    "JPEG with restart intervals": encode(photo(*SIZE), "JPEG", restart_marker_rows=1),
    "JPEG YCCK": JPEGS["YCCK"],
    "MPO": encode(photo(*SIZE), "MPO", save_all=True, append_images=[photo(8, 8)]),
    "compressed TIFF of strips": compressed_tiff(np.uint8, rowsperstrip=4),
    "compressed TIFF of tiles": compressed_tiff(np.uint8, tile=(16, 16)),
    "compressed TIFF of 16 bits": compressed_tiff(np.uint16, rowsperstrip=4),
    "GIF with 2 frames": encode(
        photo(*SIZE), "GIF", save_all=True, append_images=[photo(*SIZE, seed=2)]
    ),
}
LENGTH = {"GIF with 2 frames": 0.5, "MPO": 0.8}  # of the first picture


@pytest.mark.parametrize("kind", IN_PART)
def test_rows_before_the_cut_are_those_of_the_whole_file(kind):
    data, whole = IN_PART[kind], decoded(IN_PART[kind])
    length = int(len(data) * LENGTH.get(kind, 1))
    equal = []
    for share in (0.5, 0.9):
        cut = data[: int(length * share)]
        assert refused(cut) == "truncated"
        image = accepted(cut)
        assert image.truncated
        assert (image.width, image.height) == (whole.width, whole.height)
        assert image.pixels.dtype == np.uint8 and image.pixels.flags.c_contiguous
        equal.append(rows_that_equal(image, whole, -1 if "BMP" in kind else 1))
    assert 0 < equal[0] < equal[1] < whole.height


@pytest.mark.parametrize("kind", IN_PART)
def test_whole_file_is_not_truncated(kind):
    image = accepted(IN_PART[kind])
    assert not image.truncated
    assert np.array_equal(image.pixels, decoded(IN_PART[kind]).pixels)


def test_interlaced_png_has_the_pixels_of_its_passes():
    data, whole = interlaced(), decoded(interlaced()).pixels
    image = accepted(data[: len(data) * 6 // 10])
    assert image.truncated
    is_there = np.asarray(image.pixels.any(2))
    assert 0.4 < is_there.mean() < 0.7
    assert np.array_equal(image.pixels[is_there], whole[is_there])
    assert is_there[::2].mean() > 0.9  # every second row is of the last pass but one, or earlier


@needs_djpeg
@pytest.mark.parametrize(
    "kind", ["4:2:0", "4:4:4", "optimized", "restart intervals", "grey", "RGB"]
)
def test_part_of_a_jpeg_is_that_of_djpeg(kind):
    data = JPEGS[kind]
    for length in range(data.index(SCAN) + 200, len(data) - 3, len(data) // 9):
        image = accepted(data[:length])
        assert image.truncated
        assert np.array_equal(image.pixels, by_djpeg(data[:length]))


def segment_around(data: bytes, length: int) -> int | None:
    """The start of the segment within which a file is cut."""
    sizes = {start: int.from_bytes(data[start + 2 : start + 4], "big") for start in markers(data)}
    return next((start for start, size in sizes.items() if start < length < start + 2 + size), None)


@pytest.mark.parametrize("kind", ["progressive", "grey progressive", "4:2:0"])
def test_part_of_a_jpeg_is_that_of_libjpeg(kind):
    """djpeg may differ: versions of libjpeg smooth an unfinished progressive JPEG differently."""
    data = JPEGS[kind]
    within_segments = 0
    for length in range(data.index(SCAN) + 60, len(data) - 3, 17):
        image = accepted(data[:length])
        assert image.truncated
        segment = segment_around(data, length)
        within_segments += segment is not None
        rest = data[
            : segment or length
        ]  # of a part of a segment, libjpeg makes an error or a table
        assert np.array_equal(image.pixels, simplejpeg.decode_jpeg(rest, "RGB", strict=False))
    assert within_segments or kind == "4:2:0"


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_part_of_a_jpeg_is_scaled(options, mode):
    data = encode(of_mode(mode, 800, 600), "JPEG", **options)
    cut = data[: len(data) // 2]
    image = accepted(cut, min_side=100)
    assert image.truncated
    assert image.pixels.shape == (150, 200, 3)
    assert (image.width, image.height) == (800, 600)
    whole = decoded(data, min_side=100).pixels
    if not options:
        assert np.array_equal(image.pixels[:50], whole[:50])
    assert not np.array_equal(image.pixels, whole)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_part_of_an_image_is_upright(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(*SIZE), format, exif=exif)
    # Pillow writes the tags of a TIFF before the pixels.
    image, whole = accepted(data[: len(data) // 2]), decoded(data)
    assert (image.width, image.height) == (whole.width, whole.height) == (90, 120)
    assert np.array_equal(image.pixels[:, -30:], whole.pixels[:, -30:])
    assert not np.array_equal(image.pixels[:, :30], whole.pixels[:, :30])


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_formats_that_are_decoded_as_a_whole_stay_truncated(format, share):
    data = encode(photo(*SIZE), format)
    cut = data[: int(len(data) * share)]
    assert refused(cut, truncated="accept") == refused(cut) == "truncated"


FIRST_PIXEL = {
    "PNG": lambda data: data.index(b"IDAT") + 6,
    "BMP": lambda data: int.from_bytes(data[10:14], "little"),
    "TIFF": lambda data: Image.open(io.BytesIO(data)).tile[0].offset,
}


@pytest.mark.parametrize("kind", [kind for kind in IN_PART if kind[:3] in ("PNG", "BMP", "TIF")])
def test_file_without_any_pixel_stays_an_error(kind):
    data = IN_PART[kind]
    start = FIRST_PIXEL[kind.split()[0]](data)
    for length in (start, start + 3):
        assert refused(data[:length], truncated="accept") == "truncated"


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_without_its_first_pixel_stays_an_error(kind):
    data = JPEGS[kind]
    scan = data.index(SCAN)
    start = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    assert refused(data[:start], truncated="accept") == "truncated"
    assert refused(data[: start - 1], truncated="accept") in ("truncated", "corrupt")
    assert accepted(data[: min(start + 100, len(data) - 3)]).truncated
    if kind not in ("grey progressive", "one grey optimized"):  # of which a byte is enough
        assert refused(data[: start + 1], truncated="accept") == "truncated"


def test_jpeg_of_one_colour_whose_pixels_are_all_there_is_no_blank():
    data = JPEGS["one colour progressive"]
    image = accepted(data[: markers(data)[-2]])  # without the last scan, which has nothing
    assert image.truncated
    assert np.array_equal(image.pixels, decoded(data).pixels)


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_is_accepted_or_an_error_wherever_it_is_cut(kind):
    data = JPEGS[kind]
    for length in range(0, len(data) - 2, 1 + len(data) // 60):
        try:
            image = accepted(data[:length])
        except ImageError as error:
            assert error.code in ("truncated", "corrupt", "empty", "unsupported_format")
        else:
            assert image.pixels.shape == (53, 97, 3)
            assert image.truncated


def test_corrupt_file_is_not_accepted():
    data = bytearray(encode(photo(*SIZE)))
    data[data.index(b"IDAT") + 40] ^= 1
    assert refused(bytes(data), truncated="accept") == "corrupt"


def test_pixel_limit_holds_for_truncated_files():
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF"):
        data = encode(photo(*SIZE), format)
        cut = data[: len(data) // 2]
        assert accepted(cut, max_pixels=10_800).truncated
        assert refused(cut, max_pixels=10_799, truncated="accept") == "too_large"


def test_lack_of_memory_for_a_part_is_not_an_image_error(monkeypatch):
    data = encode(photo(*SIZE))
    attempts = []

    def load(image: Image.Image) -> None:
        attempts.append(image)
        raise OSError("image file is truncated") if len(attempts) == 1 else MemoryError()

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        accepted(data[:-100])


CUT = encode(photo(*SIZE), "JPEG")[:-300]
CUT_PNG = encode(photo(*SIZE))[:-3000]


def test_other_threads_do_not_accept_truncated_files():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES

    def verdict(number: int) -> str:
        try:
            image = (decoded if number % 2 else accepted)((CUT, CUT_PNG)[number // 2 % 2])
        except ImageError as error:
            return error.code
        return f"truncated={image.truncated}"

    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(verdict, range(200)))
    assert verdicts[::2] == ["truncated=True"] * 100
    assert verdicts[1::2] == ["truncated"] * 100
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("how", [{}, {"decode_threads": 3}, {"overlap": True}], ids=str)
def test_stream_says_which_rows_are_truncated(how):
    whole = encode(photo(*SIZE), "JPEG")
    batch = series([whole, CUT, None, b"no image", CUT_PNG, whole[:-2]])
    result = rows(stream([batch], mean_engine, output="struct", truncated="accept", **how))
    flags = [None if pd.isna(row["truncated"]) else row["truncated"] for row in result]
    assert flags == [False, True, None, None, True, False]
    assert [row["error"] is None for row in result] == [True, True, True, False, True, True]
    assert [row["features"] is None for row in result] == [False, False, True, True, False, False]
    assert np.array_equal(result[0]["features"], result[5]["features"])
    assert not np.array_equal(result[0]["features"], result[1]["features"])


def test_stream_refuses_truncated_files_by_default():
    for data in (CUT, CUT_PNG):
        row = small_row(data)
        assert row["features"] is None and row["truncated"] is None
        assert row["error"].startswith("truncated: ")


def test_child_process_says_which_rows_are_truncated():
    (first, second) = rows(
        stream(
            [series([CUT, CUT_PNG])], mean_engine, output="struct", truncated="accept", isolate=True
        )
    )
    for row, data in ((first, CUT), (second, CUT_PNG)):
        assert row["truncated"] is True
        assert np.array_equal(row["features"], small_row(data, truncated="accept")["features"])


def test_truncated_files_are_decoded_at_a_scale_in_the_stream():
    data = encode(photo(1000, 800), "JPEG")
    preprocessing = Preprocessing(resize_size=64, crop_size=64, decode="scaled")
    (row,) = rows(
        stream(
            [series([data[: len(data) // 2]])],
            mean_engine,
            preprocessing,
            output="struct",
            truncated="accept",
        )
    )
    assert row["truncated"] is True
    assert (row["width"], row["height"]) == (1000, 800)


@pytest.mark.parametrize("isolate", [False, True])
def test_boxes_of_a_truncated_file_have_its_pixels(isolate):
    data = encode(photo(*SIZE), "JPEG")
    boxes = [box(4, 2, 60, 20), box(0, 70, 120, 20)]
    whole, part = of_boxes(
        [(series([data, data[: len(data) // 2]]), [boxes, boxes])],
        truncated="accept",
        isolate=isolate,
        output="struct",
    )
    assert (whole["truncated"], part["truncated"]) == (False, True)
    assert np.array_equal(whole["features"][0], part["features"][0])
    assert not np.array_equal(whole["features"][1], part["features"][1])


def failure(data: bytes) -> weakref.ref[ImageError]:
    try:
        decoded(data)
    except ImageError as error:
        return weakref.ref(error)
    raise AssertionError("decoded")


@pytest.mark.parametrize("data", [CUT, CUT_PNG], ids=["JPEG", "PNG"])
def test_error_does_not_keep_itself_and_the_file(data):
    gc.disable()
    try:
        assert failure(data)() is None
    finally:
        gc.enable()
