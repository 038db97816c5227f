from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from imagevec import OptionError
from imagevec.images.prepare import load
from imagevec.images.values import Value, values_of
from imagevec.spec import Preprocessing
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import (
    execution_options,
    mean_engine,
    pixels_of,
    rows,
    series,
    stream,
)
from tests.helpers.structs import BGR, file_batch, image_struct, struct_batch

PNG = encode(photo())


def test_the_values_of_a_series_are_its_items():
    values = list(values_of(series([PNG, None, "a.png"])))
    assert values == [Value(PNG), Value(None), Value("a.png", "a.png")]


def test_the_values_of_image_structs_keep_nulls():
    struct = image_struct(photo(), BGR)
    values = list(values_of(struct_batch([None, struct, None])))
    assert [value.data for value in values] == [None, struct, None]
    pixels = load(values[1], execution_options(), Preprocessing()).pixels
    assert (pixels == pixels_of(photo())).all()


def test_the_path_of_an_image_struct_is_its_origin():
    struct = image_struct(photo(), BGR)
    (value,) = values_of(struct_batch([struct], origins=["file:/b.png"]))
    assert value == Value(struct, "file:/b.png")
    (value,) = values_of(struct_batch([struct]).drop(columns="origin"))
    assert value == Value(struct, None)


def test_the_values_of_file_rows_are_their_content():
    frame = pd.DataFrame({"path": ["a", None], "length": [1, 2], "content": [PNG, None]})
    assert list(values_of(frame)) == [Value(PNG, "a"), Value(None)]


def test_the_values_of_the_rows_of_binary_file_have_their_path():
    batch = file_batch({"file:/a.png": PNG, "file:/b.png": None})
    assert list(values_of(batch)) == [Value(PNG, "file:/a.png"), Value(None, "file:/b.png")]
    assert list(values_of(batch[["content"]])) == [Value(PNG), Value(None)]


def test_another_struct_is_refused_with_what_is_accepted():
    with pytest.raises(OptionError, match=r"height, path.*binaryFile"):
        list(values_of(pd.DataFrame({"height": [1], "path": [""]})))


def test_the_first_binary_field_of_a_struct_is_the_file():
    for other in (1, None, "text"):
        frame = pd.DataFrame({"bytes": [other, other], "content": [PNG, None], "data": [PNG, PNG]})
        assert [value.data for value in values_of(frame)] == [PNG, PNG]
    assert list(values_of(pd.DataFrame({"data": [PNG, None]}))) == [Value(PNG), Value(None)]


@pytest.mark.parametrize("array", [[PNG], np.array([PNG], dtype=object), []])
def test_an_array_says_explode(array):
    with pytest.raises(OptionError, match="explode"):
        list(values_of(series([None, array])))


def test_a_struct_of_bytes_and_path_is_a_file_or_where_it_is():
    frame = pd.DataFrame({"bytes": [PNG, PNG, None, None], "path": ["a", None, "b", None]})
    values = [Value(PNG, "a"), Value(PNG), Value("b", "b"), Value(None)]
    assert list(values_of(frame)) == values
    assert list(values_of(frame[["path", "bytes"]])) == values
    assert list(values_of(frame[["bytes"]])) == [Value(PNG), Value(PNG), Value(None), Value(None)]


def test_null_bytes_are_read_from_the_path(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(encode(photo(90, 70)))
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "none.png")]
    frame = pd.DataFrame({"bytes": [None, PNG, None, None], "path": [*paths, None]})
    found = rows(stream([frame], mean_engine, output="struct"))
    assert [row["width"] for row in found] == [80, 80, None, None]
    codes = [row["error"] and row["error"].partition(":")[0] for row in found]
    assert codes == [None, None, "unreadable_path", None]
