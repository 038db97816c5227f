from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imagevec import ImageError, OptionError, Preprocessing
from imagevec.images.decode import Pixels
from imagevec.stream import Schedule, feature_stream, text_stream
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import (
    engine_of,
    execution_options,
    mean_engine,
    rows,
    run_python,
    series,
    spec_of,
    stream,
)
from tests.helpers.structs import BGR, file_batch, image_struct, struct_batch

SMALL = Preprocessing(resize_size=16, crop_size=16)

SCHEDULES = [
    {},
    {"decode_threads": 3},
    {"decode_threads": 1, "overlap": True},
    {"decode_threads": 3, "overlap": True},
]


def shade(level: int) -> bytes:
    """A grey image, whose feature is its level."""
    return encode(photo(20, 20).point(lambda _: level))


class MeanEngine:
    """The mean of each image's pixels, and how many images came at a time."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, images: Pixels) -> np.ndarray:
        assert images.dtype == np.uint8
        assert images.shape[1:] == (16, 16, 3)
        assert images.flags.c_contiguous
        self.batch_sizes.append(len(images))
        return mean_engine(images)


def levels(batches: list) -> list[int | None]:
    return [None if vector is None else round(float(vector[0])) for vector in rows(batches)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rows_come_out_as_they_went_in(schedule):
    values = [shade(1), None, b"garbage", shade(2), b"", shade(3), shade(4), None, shade(5)]
    batches = [series(values[:2]), series([]), series(values[2:3]), series(values[3:])]
    out = stream(batches, MeanEngine(), SMALL, batch_size=2, **schedule)
    assert levels(out) == [1, None, None, 2, None, 3, 4, None, 5]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("arrow_rows", [1, 7, 100])
def test_batches_are_formed_across_arrow_batches(arrow_rows, schedule):
    values = [shade(level) for level in range(20)]
    batches = [series(values[n : n + arrow_rows]) for n in range(0, 20, arrow_rows)]
    engine = MeanEngine()
    assert levels(stream(batches, engine, SMALL, batch_size=6, **schedule)) == list(range(20))
    assert engine.batch_sizes == [6, 6, 6, 2]


def test_bad_images_do_not_make_batches_smaller():
    values = [value for level in range(8) for value in (b"garbage", None, shade(level))]
    engine = MeanEngine()
    stream([series(values)], engine, SMALL, batch_size=4)
    assert engine.batch_sizes == [4, 4]


def test_nothing_in_is_nothing_out():
    engine = MeanEngine()
    assert rows(stream([], engine, SMALL)) == rows(stream([series([])], engine, SMALL)) == []
    assert engine.batch_sizes == []


def test_without_an_image_the_engine_is_not_called():
    engine = MeanEngine()
    out = stream([series([None, b"", b"garbage"] * 50)], engine, SMALL, batch_size=2)
    assert levels(out) == [None] * 150
    assert engine.batch_sizes == []


@pytest.mark.parametrize("filler", [None, b"garbage"], ids=["nulls", "garbage"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_is_held_is_bounded_by_the_batch(filler, schedule):
    taken = 0

    def batches() -> Iterator[pd.Series]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield series([filler])

    options = execution_options()
    out = feature_stream(
        batches(), MeanEngine(), spec_of(SMALL), options, Schedule(batch_size=2, **schedule)
    )
    next(out)
    assert taken < 100


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_images_are_decoded_as_they_are_needed(schedule, monkeypatch):
    opened: list[int] = []
    pillow_open = Image.open

    def counted_open(*args, **kwargs):
        opened.append(0)
        return pillow_open(*args, **kwargs)

    monkeypatch.setattr(Image, "open", counted_open)
    options = execution_options()
    batch = series([shade(level) for level in range(100)])
    out = feature_stream(
        iter([batch]), MeanEngine(), spec_of(SMALL), options, Schedule(batch_size=4, **schedule)
    )
    next(out)
    assert 4 <= len(opened) <= 24


def test_vectors_are_float32_and_their_own_memory():
    first, second = rows(stream([series([shade(1), shade(2)])], MeanEngine(), SMALL))
    assert first.dtype == np.float32
    assert first.shape == (3,)
    first[:] = 0
    assert second[0] == 2


def test_a_struct_tells_the_size_and_the_reason():
    values = [encode(photo(30, 20)), None, b"", b"garbage"]
    good, null, empty, garbage = rows(
        stream([series(values)], MeanEngine(), SMALL, output="struct")
    )
    assert good["features"].shape == (3,)
    assert (good["error"], good["width"], good["height"]) == (None, 30, 20)
    assert null["features"] is None
    assert null["error"] is None
    assert empty["features"] is None
    assert empty["error"].startswith("empty: ")
    assert garbage["error"].startswith("unsupported_format: ")
    assert all(pd.isna(row[side]) for row in (null, empty) for side in ("width", "height"))


def test_several_layers_are_split():
    values = [encode(photo(30, 20)), None, b"garbage"]
    sizes = {"a.b": 1, "c": 2}
    (whole, *_) = rows(stream([series(values)], MeanEngine(), SMALL))
    batch: Any
    (batch,) = stream([series(values)], MeanEngine(), SMALL, layer_sizes=sizes)
    assert list(batch.columns) == ["a.b", "c"]
    good, *nulls = batch.to_dict(orient="records")
    np.testing.assert_array_equal(np.concatenate([good["a.b"], good["c"]]), whole)
    assert good["a.b"].dtype == np.float32
    assert nulls == [{"a.b": None, "c": None}] * 2
    (struct,) = stream([series(values)], MeanEngine(), SMALL, layer_sizes=sizes, output="struct")
    assert list(struct["features"][0]) == ["a.b", "c"]
    np.testing.assert_array_equal(struct["features"][0]["c"], whole[1:])
    assert list(struct["features"][1:]) == nulls


def test_the_size_is_the_one_that_is_shown():
    exif = photo().getexif()
    exif[0x0112] = 6
    data = encode(photo(30, 20), "JPEG", exif=exif)
    (row,) = rows(stream([series([data])], MeanEngine(), SMALL, output="struct", decode="scaled"))
    assert (row["width"], row["height"]) == (20, 30)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_on_error_raise_raises_the_reason(schedule):
    batch = series([shade(1), None, b"garbage", shade(2)])
    with pytest.raises(ImageError, match="unsupported_format: .*garbage"):
        stream([batch], MeanEngine(), SMALL, on_error="raise", **schedule)


def raised(batch: pd.Series | pd.DataFrame, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as error:
        stream([batch], MeanEngine(), SMALL, on_error="raise", **options)
    return error.value


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_on_error_raise_names_the_path_of_a_string(schedule, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(shade(1))
    bad.write_bytes(b"garbage")
    error = raised(series([str(good), None, str(bad)]), **schedule)
    assert error.code == "unsupported_format"
    assert str(error).startswith(f"unsupported_format: {bad}: starts with ")
    assert isinstance(error.__cause__, ImageError)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_on_error_raise_names_the_path_of_a_file_row(schedule):
    contents = {"file:/good.png": shade(1), "file:/none.png": None, "file:/bad.png": b"garbage"}
    error = raised(file_batch(contents), **schedule)
    assert str(error).startswith("unsupported_format: file:/bad.png: starts with ")


def test_on_error_raise_names_the_origin_of_an_image_struct():
    good = image_struct(photo(20, 20), BGR)
    batch = struct_batch([good, good._replace(height=21)], origins=["file:/a.png", "file:/b.png"])
    error = raised(batch)
    assert error.code == "corrupt"
    assert error.detail.startswith("file:/b.png: ")


@pytest.mark.parametrize("options", [{}, {"allowed_roots": ["/photos"]}], ids=str)
def test_on_error_raise_names_a_path_once(options):
    path = "/no such/a.png"
    row, *_ = rows(stream([series([path])], MeanEngine(), SMALL, output="struct", **options))
    error = raised(series([path]), **options)
    assert path in error.detail
    assert str(error) == row["error"]


def test_on_error_raise_names_no_path_where_there_is_none():
    assert raised(series([b"garbage"])).detail == "starts with b'garbage', plain text"


def test_an_error_row_is_the_same_whether_its_path_is_known(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"garbage")
    batches: list[Any]
    batches = [series([str(path)]), series([b"garbage"]), file_batch({str(path): b"garbage"})]
    of_path, of_bytes, of_file = rows(stream(batches, MeanEngine(), SMALL, output="struct"))
    assert of_path["error"] == of_bytes["error"] == of_file["error"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_on_error_raise_lets_nulls_through(schedule):
    batch = series([None, shade(1), None])
    out = stream([batch], MeanEngine(), SMALL, on_error="raise", **schedule)
    assert levels(out) == [None, 1, None]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_column_of_another_type_is_refused(schedule):
    with pytest.raises(OptionError, match="int values"):
        stream([series([7])], MeanEngine(), SMALL, **schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_engines_error_is_not_a_bad_image(schedule):
    def engine(images: Pixels) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        stream([series([shade(1)])], engine, SMALL, **schedule)


WRONG_SHAPES = {
    "fewer rows": lambda vectors: vectors[1:],
    "more rows": lambda vectors: np.repeat(vectors, 2, axis=0),
    "no rows": lambda vectors: vectors[:0],
    "fewer columns": lambda vectors: vectors[:, :2],
    "more columns": lambda vectors: np.repeat(vectors, 2, axis=1),
    "rows as columns": lambda vectors: vectors.reshape(-1, 1),
    "one dimension": lambda vectors: vectors[:, 0],
    "three dimensions": lambda vectors: vectors[None],
}


@pytest.mark.parametrize("change", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
@pytest.mark.parametrize("layer_sizes", [None, {"a": 1, "b": 2}])
def test_another_number_of_vectors_or_features_is_an_error(change, layer_sizes):
    column = series([shade(1), b"no image", shade(2), None, shade(3)])
    assert len(rows(stream([column], mean_engine, SMALL, layer_sizes=layer_sizes))) == 5
    with pytest.raises(OptionError, match=r"for a batch of 3 has the shape .*, not \(3, 3\)"):
        stream([column], lambda x: change(mean_engine(x)), SMALL, layer_sizes=layer_sizes)


def test_another_number_of_texts_is_an_error():
    tokenizer: Any = LengthTokenizer()
    texts = [series(["a", None, "b", "c"])]
    with pytest.raises(OptionError, match=r"for a batch of 3 has the shape \(2, 1\), not \(3, 1\)"):
        list(text_stream(texts, lambda x: x[1:].astype(np.float32), TEXTS, tokenizer, Schedule(4)))


def test_paths_and_structs_are_rows_too(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(shade(9))
    assert levels(stream([series([str(path), "no such"])], MeanEngine(), SMALL)) == [9, None]
    struct = image_struct(photo(20, 20).point(lambda _: 8), BGR)
    assert levels(stream([struct_batch([struct, None])], MeanEngine(), SMALL)) == [8, None]


def test_a_bad_image_leaves_its_neighbours_as_they_were():
    engine = engine_of(model="squeezenet1_1", weights="random")
    images = [encode(photo(seed=seed)) for seed in range(3)]
    clean = rows(stream([series(images)], engine, num_features=512))
    with_bad = [images[0], b"garbage", images[1], encode(photo(), "JPEG")[:300], images[2], None]
    found = rows(stream([series(with_bad)], engine, num_features=512))
    mixed = [vector for vector in found if vector is not None]
    np.testing.assert_array_equal(np.stack(clean), np.stack(mixed))


def test_the_stream_images_and_texts_import_neither_pytorch_nor_spark():
    imported = run_python("""
import importlib, pkgutil, sys
import imagevec.images, imagevec.texts
for wing in (imagevec.images, imagevec.texts):
    for module in pkgutil.iter_modules(wing.__path__, f"{wing.__name__}."):
        importlib.import_module(module.name)
import imagevec.stream
print(*sys.modules)
""").split()
    assert {"imagevec.images.decode", "imagevec.images.isolation", "imagevec.stream"} <= {*imported}
    assert {"torch", "torchvision", "timm", "pyspark", "openvino"}.isdisjoint(imported)


TEXTS = dataclasses.replace(spec_of(SMALL), num_features=1)


class LengthTokenizer:
    """A text's length as its only token."""

    def __call__(self, text: str) -> np.ndarray:
        return np.array([len(text)], np.int32)

    def stack(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.stack(rows)


@given(
    batches=st.lists(st.lists(st.none() | st.text(max_size=5), max_size=6), max_size=6),
    batch_size=st.integers(1, 9),
)
def test_any_split_of_texts_gives_a_row_for_a_row(batches, batch_size):
    sizes = []

    def engine(tokens: np.ndarray) -> np.ndarray:
        sizes.append(len(tokens))
        return tokens.astype(np.float32)

    counts: Any = defaultdict(float)
    tokenizer: Any = LengthTokenizer()
    split = [pd.Series(batch, dtype=object) for batch in batches]
    how = Schedule(batch_size)
    found = rows(text_stream(iter(split), engine, TEXTS, tokenizer, how, counts))
    texts = [text for batch in batches for text in batch]
    expected = [None if text is None else float(len(text)) for text in texts]
    assert [None if vector is None else vector.item() for vector in found] == expected
    assert all(size <= batch_size for size in sizes)
    assert counts["rows"] == len(texts)
    assert counts["texts"] == sum(sizes) == len(texts) - texts.count(None)
