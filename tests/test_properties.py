from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagevec import Preprocessing
from tests.helpers.factories import tiny
from tests.helpers.images import FORMATS_AND_MODES, cosine, encode, of_mode, photo
from tests.helpers.pipeline import (
    decoded,
    engine_of,
    mean_engine,
    preprocess,
    rows,
    series,
    stream,
)

MAX_PIXELS = 150_000  # of a generated image, to keep it quick


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Width and height, of 1x1 to 3000 wide or high and of any aspect ratio."""
    long = draw(st.integers(1, 3000))
    short = draw(st.integers(1, max(1, min(long, MAX_PIXELS // long))))
    return draw(st.sampled_from([(long, short), (short, long)]))


PREPROCESSINGS = st.builds(
    lambda crop, margin, interpolation, squash, decode: Preprocessing(
        resize_size=crop + margin,
        crop_size=crop,
        interpolation=interpolation,
        squash=squash,
        decode=decode,
    ),
    crop=st.sampled_from([1, 32, 224]),
    margin=st.integers(0, 40),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    squash=st.booleans(),
    decode=st.sampled_from(["exact", "scaled"]),
)


@given(st.sampled_from(FORMATS_AND_MODES), sizes(), PREPROCESSINGS, st.integers(0, 9))
def test_any_image_becomes_the_models_input(format_and_mode, size, preprocessing, seed):
    format, mode = format_and_mode
    width, height = size
    data = encode(of_mode(mode, width, height, seed), format)
    image = decoded(data, min_side=preprocessing.min_decoded_side)
    assert (image.width, image.height) == size
    assert image.pixels.dtype == np.uint8
    if preprocessing.decode == "exact":
        assert image.pixels.shape == (image.height, image.width, 3)
    ready = preprocess(image.pixels, preprocessing)
    assert ready.dtype == torch.float32
    assert ready.shape == (3, preprocessing.crop_size, preprocessing.crop_size)
    assert ready.isfinite().all()


@given(st.binary(max_size=300))
def test_any_bytes_are_an_image_or_an_error(data):
    (row,) = rows(stream([series([data])], mean_engine, SMALL, output="struct"))
    assert (row["features"] is None) == (row["error"] is not None)


SMALL = Preprocessing(resize_size=16, crop_size=16)
IMAGES = [
    encode(photo(20, 16, seed=0), "PNG"),
    encode(photo(16, 40, seed=1), "JPEG"),
    encode(photo(300, 2, seed=2), "WEBP"),
    encode(of_mode("P", 18, 17, seed=3), "GIF"),
]
BAD = [b"", b"garbage", IMAGES[1][:200], b"\x89PNG\r\n\x1a\n"]

VALUES = st.lists(st.sampled_from([*IMAGES, *BAD, None]), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=12)
SCHEDULES = st.sampled_from(
    [
        {},
        {"decode_threads": 2},
        {"decode_threads": 1, "overlap": True},
        {"decode_threads": 2, "overlap": True},
    ]
)


def split(values: list[Any], cuts: list[int]) -> list[Any]:
    """Arrow batches of the values, cut at some places; two equal cuts make an empty batch."""
    ends = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    return [series(values[begin:end]) for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def vectors_one_by_one(
    values: list[Any], engine: Any, preprocessing: Preprocessing, num_features: int = 3
) -> list[Any]:
    return [
        rows(stream([series([value])], engine, preprocessing, 1, num_features=num_features))[0]
        for value in values
    ]


@given(VALUES, CUTS, st.integers(1, 9), SCHEDULES)
def test_any_split_into_arrow_batches_gives_the_same_rows(values, cuts, batch_size, schedule):
    out = rows(stream(split(values, cuts), mean_engine, SMALL, batch_size, **schedule))
    expected = vectors_one_by_one(values, mean_engine, SMALL)
    assert len(out) == len(values)
    for ours, alone in zip(out, expected, strict=True):
        np.testing.assert_array_equal(ours, alone)


@given(VALUES, CUTS, st.integers(1, 9), SCHEDULES)
def test_a_struct_tells_why_a_vector_is_null(values, cuts, batch_size, schedule):
    batches = split(values, cuts)
    out = rows(stream(batches, mean_engine, SMALL, batch_size, output="struct", **schedule))
    assert len(out) == len(values)
    for row, value in zip(out, values, strict=True):
        assert (row["features"] is not None) == (value in IMAGES)
        assert (row["error"] is not None) == (value in BAD)


@pytest.fixture(scope="module")
def engine() -> Any:
    return engine_of(model=tiny, weights="random")


@pytest.fixture(scope="module")
def alone(engine: Any) -> dict[bytes, np.ndarray]:
    """The vector of each image, computed on its own."""
    vectors = vectors_one_by_one(IMAGES, engine, Preprocessing(), num_features=8)
    return dict(zip(IMAGES, vectors, strict=True))


@settings(max_examples=30)
@given(values=VALUES, cuts=CUTS, batch_size=st.integers(1, 9))
def test_a_vector_does_not_depend_on_the_split(engine, alone, values, cuts, batch_size):
    batches = split(values, cuts)
    out = rows(stream(batches, engine, Preprocessing(), batch_size, num_features=8))
    assert len(out) == len(values)
    for vector, value in zip(out, values, strict=True):
        if value in IMAGES:
            assert vector.shape == (8,)
            assert np.abs(vector - alone[value]).max() <= 1e-4 * np.abs(alone[value]).max()
            assert cosine(vector, alone[value]) > 0.999999
        else:
            assert vector is None
