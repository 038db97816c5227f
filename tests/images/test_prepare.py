from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagevec import ImageError, OptionError, Preprocessing
from imagevec.images.prepare import Row, load, prepare
from imagevec.images.preprocess import resize_and_crop
from imagevec.images.values import Value
from tests.helpers.images import encode, of_mode, photo
from tests.helpers.pipeline import decoded, execution_options, pixels_of
from tests.helpers.structs import BGR, BGRA, GREY, image_struct

PNG = encode(photo())


def refused(data: Any, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        load(Value(data), execution_options(**options), Preprocessing())
    return error.value


@pytest.mark.parametrize("data", [PNG, bytearray(PNG)], ids=["bytes", "bytearray"])
def test_bytes_are_decoded(data):
    assert np.array_equal(
        load(Value(data), execution_options(), Preprocessing()).pixels, pixels_of(photo())
    )


def test_limits_and_formats_are_passed_on():
    assert refused(PNG, max_pixels=10).code == "too_large"
    assert refused(PNG, formats=["JPEG"]).code == "unsupported_format"


@pytest.mark.parametrize(
    ("pillow_mode", "mode"), [("L", GREY), ("RGB", BGR), ("RGBA", BGRA)], ids=["L", "RGB", "RGBA"]
)
def test_an_image_struct_has_the_pixels_of_its_file(pillow_mode, mode):
    image = of_mode(pillow_mode)
    loaded = load(Value(image_struct(image, mode)), execution_options(), Preprocessing())
    assert (loaded.width, loaded.height) == (80, 60)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.pixels.flags.c_contiguous
    assert np.array_equal(loaded.pixels, pixels_of(image.convert("RGB")))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"mode": 5}, "unsupported_format"),
        ({"mode": GREY}, "unsupported_format"),
        ({"mode": -1, "height": -1, "width": -1, "n_channels": -1, "data": b""}, "corrupt"),
        ({"height": 61}, "corrupt"),
        ({"data": b""}, "corrupt"),
        ({"width": 0}, "corrupt"),
    ],
    ids=["floats", "wrong channels", "Spark's mark of a bad file", "too short", "none", "no width"],
)
def test_an_image_struct_that_makes_no_sense_is_a_bad_image(change, code):
    assert refused(image_struct(photo(), BGR)._replace(**change)).code == code


def test_an_image_struct_has_the_pixel_limit_too():
    assert refused(image_struct(photo(), BGR), max_pixels=4799).code == "too_large"


def test_what_could_not_be_read_is_raised_as_it_is():
    error = ImageError("unreadable_path", "no such file")
    assert refused(error) is error


@pytest.mark.parametrize("data", [7, 1.5, [1, 2], {"a": 1}, np.zeros(3)], ids=repr)
def test_another_type_is_refused_with_what_is_accepted(data):
    with pytest.raises(OptionError, match=rf"{type(data).__name__}.*binary.*string"):
        load(Value(data), execution_options(), Preprocessing())


def test_a_null_is_an_empty_row():
    assert prepare(Value(None, "a.png"), Preprocessing(), execution_options()) == Row()


def test_an_image_is_its_crop_and_its_size():
    row = prepare(Value(PNG), Preprocessing(), execution_options())
    assert row.input is not None
    assert row.input.shape == (224, 224, 3)
    assert np.array_equal(row.input, resize_and_crop(pixels_of(photo()), Preprocessing()))
    assert (row.width, row.height, row.error) == (80, 60, None)
    assert row.decode_seconds > 0
    assert row.preprocess_seconds > 0


def test_a_bad_image_is_a_row_with_its_error():
    row = prepare(Value(b"garbage"), Preprocessing(), execution_options(on_error="raise"))
    assert row.input is None
    assert row.error is not None
    assert row.error.code == "unsupported_format"


def test_a_scaled_decode_keeps_the_size_that_is_shown():
    data = encode(photo(1600, 1200), "JPEG")
    scaled = Preprocessing(decode="scaled")
    row = prepare(Value(data), scaled, execution_options())
    half = decoded(data, min_side=512).pixels
    assert half.shape == (600, 800, 3)
    assert row.input is not None
    assert np.array_equal(row.input, resize_and_crop(half, scaled))
    assert (row.width, row.height) == (1600, 1200)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_error_row_does_not_keep_the_decoded_image(format):
    def images_in_memory() -> int:
        gc.collect()
        return sum(issubclass(type(known), Image.Image) for known in gc.get_objects())

    data = encode(photo(), format)
    value = Value(data[: len(data) // 2])
    before = images_in_memory()
    row = prepare(value, Preprocessing(), execution_options())
    assert row.error is not None
    assert images_in_memory() == before
