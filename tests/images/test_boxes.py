from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagevec import ImageError, OptionError
from imagevec.images.boxes import MAX_BOXES, edges, values_with_boxes
from imagevec.images.values import Box
from tests.helpers.images import photo
from tests.helpers.pipeline import pixels_of, series

WIDTH, HEIGHT = 12, 9
IMAGE = photo(WIDTH, HEIGHT).point(lambda level: max(level, 1))  # Pillow fills up with zeros

# Multiples of 1/8, among them halves, around the image.
SIDES = st.integers(-100, 200).map(lambda side: side / 8)


@given(SIDES, SIDES, SIDES, SIDES)
def test_edges_are_those_of_pillow_within_the_image(left, top, width, height):
    theirs = np.zeros((0, 0, 3), np.uint8)
    if width > 0 and height > 0:
        theirs = pixels_of(IMAGE.crop((left, top, left + width, top + height)))
    theirs = theirs[(theirs > 0).any((1, 2))][:, (theirs > 0).any((0, 2))]
    try:
        x, y, right, bottom = edges(Box(left, top, width, height), WIDTH, HEIGHT)
    except ImageError as error:
        assert error.code == "bad_box"
        assert theirs.size == 0
    else:
        np.testing.assert_array_equal(pixels_of(IMAGE)[y:bottom, x:right], theirs)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (None, "null"),
        (Box(None, 1, 2, 3), "a null in left None, top 1, width 2, height 3"),
        (Box(1, 1, 2, None), "a null in"),
        (Box(math.nan, 1, 2, 3), "not finite: left nan"),
        (Box(1, math.inf, 2, 3), "not finite"),
        (Box(1, 1, -math.inf, 3), "not finite"),
        (Box(1e308, 1, 1e308, 3), "not finite"),
        (Box(1, 1, 0, 3), "empty: left 1, top 1, width 0, height 3"),
        (Box(1, 1, 2, -3), "empty"),
        (Box(1.6, 1, 0.8, 3), "empty"),  # from 2 to 2
        (Box(WIDTH, 0, 2, 3), f"outside the image of {WIDTH}x{HEIGHT} pixels: left 12"),
        (Box(0, HEIGHT, 2, 3), "outside"),
        (Box(-2, 0, 2, 3), "outside"),
        (Box(0, -7, 2, 6.9), "outside"),
        (Box(1e300, 0, 2, 3), "outside|empty"),
    ],
    ids=str,
)
def test_bad_box_states_its_reason(box, reason):
    with pytest.raises(ImageError, match=f"^bad_box: ({reason})"):
        edges(box, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (Box(0, 0, WIDTH, HEIGHT), (0, 0, WIDTH, HEIGHT)),
        (Box(-5, -5, 100, 100), (0, 0, WIDTH, HEIGHT)),
        (Box(-1e300, -1e300, 2e300, 2e300), (0, 0, WIDTH, HEIGHT)),
        (Box(10.4, 7.6, 5, 5), (10, 8, WIDTH, HEIGHT)),
        (Box(0.5, 1.5, 2, 2), (0, 2, 2, 4)),  # a half to even
        (Box(1.4, 1.4, 0.2, 0.2), (1, 1, 2, 2)),
    ],
    ids=str,
)
def test_box_is_rounded_and_clipped(box, expected):
    assert edges(box, WIDTH, HEIGHT) == expected


class SparkRow(tuple):
    """A row of Spark: a tuple whose items are found by the names of its fields, too."""

    __fields__: list[str]

    def __new__(cls, **fields: Any) -> SparkRow:
        row = super().__new__(cls, fields.values())
        row.__fields__ = list(fields)
        return row

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int | slice):
            return super().__getitem__(item)
        try:
            return super().__getitem__(self.__fields__.index(item))
        except ValueError:
            raise ValueError(item) from None


def read(cell: Any) -> Any:
    (value,) = values_with_boxes((series([b"image"]), series([cell])))
    return value.boxes


SHUFFLED = {"label": "cat", "height": 4, "width": 3, "top": 2, "left": 1}
READ = (Box(1, 2, 3, 4),)


@pytest.mark.parametrize("make", [dict, SparkRow], ids=["dictionary", "row"])
@pytest.mark.parametrize("collect", [list, lambda items: np.array([*items, None], object)[:-1]])
def test_fields_are_found_by_name(make, collect):
    assert read(collect([make(**SHUFFLED)])) == READ


@pytest.mark.parametrize("number", [int, float, Decimal, np.int8, np.float32, np.uint64])
def test_numbers_of_any_type_are_read(number):
    box = {name: number(SHUFFLED[name]) for name in Box._fields}
    assert read([box, None, {**box, "top": None}]) == (*READ, None, Box(1, None, 3, 4))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (7, "the boxes are int values"),
        ("boxes", "the boxes are str values"),
        (SHUFFLED, "the boxes are dict values"),
        ([7], "a box is 7"),
        ([1.0, 2.0, 3.0, 4.0], "a box is 1.0"),
        (["left"], "a box is 'left'"),
        ([[1, 2, 3, 4]], r"a box is \[1, 2, 3, 4\]"),
        ([{"x": 1, "y": 2, "w": 3, "h": 4}], "a box is {'x': 1"),
        ([SparkRow(left=1, top=2)], "a box is"),
        ([[("left", 1), ("top", 2), ("width", 3), ("height", 4)]], "a box is"),  # an Arrow map
        ([{**SHUFFLED, "left": "1"}], "a box has the field '1'"),
        ([{**SHUFFLED, "left": True}], "a box has the field True"),
        ([{**SHUFFLED, "left": [1]}], r"a box has the field \[1\]"),
    ],
    ids=str,
)
def test_boxes_of_another_type_are_refused(cell, reason):
    expected = rf"{reason}.*: boxes must be of type array<struct<left,top,width,height>>"
    with pytest.raises(OptionError, match=expected):
        read(cell)


def test_struct_of_boxes_is_refused():
    boxes: Any = pd.DataFrame({"left": [1], "top": [2]})
    with pytest.raises(OptionError, match="the boxes are a struct of left, top: boxes must be of"):
        list(values_with_boxes((series([b"image"]), boxes)))


@pytest.mark.parametrize("columns", [1, 3])
def test_another_number_of_columns_is_refused(columns):
    batch: Any = series([b"image"]) if columns == 1 else (series([b"image"]),) * columns
    with pytest.raises(OptionError, match="takes two columns: images and boxes"):
        list(values_with_boxes(batch))


def test_nulls_and_too_many_boxes_are_not_to_be_read():
    box = {name: 1 for name in Box._fields}
    cells = [None, [box], [box] * MAX_BOXES, [box] * (MAX_BOXES + 1), [None] * (MAX_BOXES + 1)]
    images = ["a.png", None, "b.png", "c.png", None]
    values = list(values_with_boxes((series(images), series(cells))))
    assert [value.data for value in values[:3]] == [None, None, "b.png"]
    assert [len(value.boxes or ()) for value in values] == [0, 0, MAX_BOXES, 0, 0]
    assert str(values[3].data) == "bad_box: 10,001 boxes, of which an image can have 10,000"
    assert values[4].data is None
