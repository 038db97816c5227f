from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imagevec import ImageError, OptionError
from imagevec.images.values import load, read, read_ahead, values_of
from tests.helpers.images import encode, of_mode, photo
from tests.helpers.pipeline import execution_options, pixels_of, series, small_row
from tests.helpers.structs import BGR, BGRA, GREY, image_struct, struct_batch

PNG = encode(photo())


def refused(value: object, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        load(value, execution_options(**options))
    return error.value


@pytest.mark.parametrize("value", [PNG, bytearray(PNG)], ids=["bytes", "bytearray"])
def test_bytes_are_decoded(value):
    assert torch.equal(load(value, execution_options()).pixels, pixels_of(photo()))


def test_limits_and_formats_are_passed_on():
    assert refused(PNG, max_pixels=10).code == "too_large"
    assert refused(PNG, formats=["JPEG"]).code == "unsupported_format"


NAMES = ["a.png", "a b.png", "a:b.png", "ä.png", "a#b.png", "a?b.png", "100%.png", "a+b.png"]


FORMS = {
    "path": str,
    "uri": lambda path: path.as_uri(),  # file:///, escaped: input_file_name(), image.origin
    "file:": lambda path: f"file:{path}",  # not escaped: the path of binaryFile
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_path_is_read_in_every_form_that_spark_has(tmp_path, name, form):
    path = tmp_path / name
    path.write_bytes(PNG)
    value = FORMS[form](path)
    assert read(value) == PNG
    assert small_row(value)["width"] == 80


def test_a_relative_path_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(PNG)
    assert read("a.png") == PNG


@pytest.mark.parametrize(
    "path",
    ["", "/no/such/file.png", ".", "/", "a\x00b", "x" * 5000, "nope:x", "foo://x/y", "C:\\a.png"],
    ids=lambda path: ascii(path)[:20],
)
def test_a_path_that_cannot_be_read_says_so(path):
    error = small_row(path)["error"]
    assert error.startswith("unreadable_path: ")
    assert path in error


def test_a_file_that_is_no_image_is_told_from_one_that_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    assert small_row(str(tmp_path / "a.txt"))["error"].startswith("unsupported_format: ")


@given(st.text(max_size=60).filter(lambda text: "://" not in text))
def test_any_text_is_a_path_or_an_image_error(text):
    code, _, _ = small_row(text)["error"].partition(":")
    assert code in ("unreadable_path", "unsupported_format", "empty")


def test_many_paths_stay_in_order(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(50)]
    for level, path in enumerate(paths):
        Image.new("RGB", (4, 4), (level, 0, 0)).save(path)
    values = [value for path in paths for value in (path, None, "no such")]
    contents = list(read_ahead(values))
    assert [type(content) for content in contents] == [bytes, type(None), ImageError] * 50
    images = [load(content, execution_options()) for content in contents[::3]]
    assert [int(image.pixels[0, 0, 0]) for image in images] == list(range(50))


@pytest.mark.parametrize(
    ("pillow_mode", "mode"), [("L", GREY), ("RGB", BGR), ("RGBA", BGRA)], ids=["L", "RGB", "RGBA"]
)
def test_an_image_struct_has_the_pixels_of_its_file(pillow_mode, mode):
    image = of_mode(pillow_mode)
    loaded = load(image_struct(image, mode), execution_options())
    assert (loaded.width, loaded.height) == (80, 60)
    assert loaded.pixels.dtype == torch.uint8
    assert torch.equal(loaded.pixels, pixels_of(image.convert("RGB")))


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


def test_the_values_of_a_series_are_its_items():
    assert list(values_of(series([PNG, None, "a.png"]))) == [PNG, None, "a.png"]


def test_the_values_of_image_structs_keep_nulls():
    struct = image_struct(photo(), BGR)
    values = list(values_of(struct_batch([None, struct, None])))
    assert values == [None, struct, None]
    assert torch.equal(load(values[1], execution_options()).pixels, pixels_of(photo()))


def test_the_values_of_file_rows_are_their_content():
    frame = pd.DataFrame({"path": ["a", None], "length": [1, 2], "content": [PNG, None]})
    assert list(values_of(frame)) == [PNG, None]


def test_another_struct_is_refused_with_what_is_accepted():
    with pytest.raises(OptionError, match=r"height, data.*binaryFile"):
        list(values_of(pd.DataFrame({"height": [1], "data": [b""]})))


@pytest.mark.parametrize("value", [7, 1.5, [1, 2], {"a": 1}, np.zeros(3)], ids=repr)
def test_another_type_is_refused_with_what_is_accepted(value):
    with pytest.raises(OptionError, match=rf"{type(value).__name__}.*binary.*string"):
        load(value, execution_options())
