from __future__ import annotations

import tracemalloc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from imagevec import ImageError, OptionError, Preprocessing
from imagevec.images.boxes import MAX_BOXES
from imagevec.images.decode import Pixels
from imagevec.images.values import Box
from imagevec.stream import Schedule, box_stream
from tests.helpers.images import encode, opened, photo
from tests.helpers.pipeline import execution_options, mean_engine, rows, series, spec_of, stream
from tests.helpers.structs import BGR, file_batch, image_struct, struct_batch

SIDE = 16
SMALL = Preprocessing(resize_size=SIDE, crop_size=SIDE)

SCHEDULES = [
    {},
    {"decode_threads": 3},
    {"decode_threads": 1, "overlap": True},
    {"decode_threads": 3, "overlap": True},
]


def box(left: Any, top: Any, width: Any, height: Any) -> dict[str, Any]:
    return dict(zip(Box._fields, (left, top, width, height), strict=True))


def of_boxes(
    batches: Iterable[tuple[Any, Any]],
    engine: Any = mean_engine,
    preprocessing: Preprocessing = SMALL,
    batch_size: int = 4,
    decode_threads: int = 1,
    overlap: bool = False,
    layer_sizes: dict[str, int] | None = None,
    num_features: int = 3,
    counts: Any = None,
    **options: Any,
) -> list[Any]:
    """Passes Arrow batches of images and boxes through ``box_stream``, and returns its rows."""
    out = box_stream(
        ((images, series(cells)) for images, cells in batches),
        engine,
        spec_of(preprocessing, layer_sizes, num_features),
        execution_options(boxes="boxes", **options),
        Schedule(batch_size, decode_threads=decode_threads, overlap=overlap),
        counts,
    )
    return rows(out)


class PixelEngine:
    """The pixels of each image, and how many images came at a time."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, images: Pixels) -> np.ndarray:
        assert images.flags.c_contiguous
        self.batch_sizes.append(len(images))
        return images.reshape(len(images), -1).astype(np.float32)


PIXELS: dict[str, Any] = {"num_features": SIDE * SIDE * 3}


def cropped_first(image: bytes, boxes: Iterable[dict[str, Any]]) -> list[np.ndarray]:
    """Crops by Pillow, and passes the crops through the stream of images."""
    shown = ImageOps.exif_transpose(opened(image)).convert("RGB")
    crops = []
    for left, top, width, height in (each.values() for each in boxes):
        right, bottom = min(left + width, shown.width), min(top + height, shown.height)
        crops.append(encode(shown.crop((max(left, 0), max(top, 0), right, bottom))))
    return rows(stream([series(crops)], PixelEngine(), SMALL, **PIXELS))


def rotated() -> bytes:
    exif = photo().getexif()
    exif[0x0112] = 6
    return encode(photo(80, 50), "JPEG", exif=exif)


BOXES = [
    box(0, 0, 50, 30),
    box(3, 4, 20, 25),
    box(10, 0, 1, 30),
    box(2.5, 3.5, 17.25, 9.5),
    box(-10, -10, 30, 30),
    box(40, 20, 500, 500),
]


@pytest.mark.parametrize("decode", ["exact", "scaled"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "image",
    [encode(photo(90, 60)), rotated(), encode(photo(640, 480), "JPEG"), encode(photo(), "WEBP")],
    ids=["PNG", "rotated JPEG", "large JPEG", "WEBP"],
)
def test_box_has_the_pixels_of_cropping_first(image, schedule, decode):
    engine = PixelEngine()
    batches = [(series([image, image]), [BOXES, BOXES[:1]])]
    both = of_boxes(batches, engine, decode=decode, **PIXELS, **schedule)
    expected = cropped_first(image, BOXES)
    assert [len(vectors) for vectors in both] == [6, 1]
    np.testing.assert_array_equal(np.stack(both[0]), np.stack(expected))
    np.testing.assert_array_equal(both[1][0], expected[0])
    assert engine.batch_sizes == [4, 3]


@pytest.mark.parametrize("isolate", [False, True])
def test_any_kind_of_column_has_boxes(isolate, tmp_path):
    picture = photo(30, 20)
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture))
    (expected,) = cropped_first(encode(picture), [box(1, 2, 9, 8)])
    cell = [box(1, 2, 9, 8), box(1, 2, 0, 8)]
    for images in (
        series([encode(picture), None]),
        series([str(path), None]),
        struct_batch([image_struct(picture, BGR), None]),
        file_batch({str(path): encode(picture), "none": None}),
    ):
        good, null = of_boxes(
            [(images, [cell, cell])], PixelEngine(), isolate=isolate, output="struct", **PIXELS
        )
        np.testing.assert_array_equal(good["features"][0], expected)
        assert good["features"][1] is None and good["box_errors"][0] is None
        assert good["box_errors"][1].startswith("bad_box: empty: left 1")
        assert null["features"] is null["error"] is null["box_errors"] is None


# The colour of a pixel is its place, so that the vector of a box of one pixel is that place.
PLACES = encode(
    Image.fromarray(np.array([[(x, y, 0) for x in range(12)] for y in range(9)], np.uint8))
)
CELLS = st.none() | st.lists(
    st.none()
    | st.tuples(st.integers(-2, 13), st.integers(-2, 10)).map(
        lambda place: box(place[0], place[1], 1, 1)
    ),
    max_size=7,
)
IMAGES = st.sampled_from([PLACES, PLACES, PLACES, None, b"", b"garbage"])


def expected_of(image: bytes | None, cell: list[Any] | None) -> Any:
    """The places of the boxes, with a null for each bad one; a code; or a null."""
    if image is None or cell is None:
        return None
    if image is not PLACES:
        return "unsupported_format" if image else "empty"
    places = [each and (each["left"], each["top"]) for each in cell]
    return [
        place if place and place[0] in range(12) and place[1] in range(9) else None
        for place in places
    ]


@given(
    batches=st.lists(st.lists(st.tuples(IMAGES, CELLS), max_size=5), max_size=5),
    batch_size=st.integers(1, 9),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_split_gives_a_row_for_a_row_and_a_vector_for_a_box(batches, batch_size, schedule):
    sizes: list[int] = []

    def engine(images: Pixels) -> np.ndarray:
        sizes.append(len(images))
        return mean_engine(images)

    counts: Any = defaultdict(float)
    split = [(series([i for i, _ in batch]), [c for _, c in batch]) for batch in batches]
    options = {"batch_size": batch_size, "counts": counts, **schedule}
    found = of_boxes(split, engine, output="struct", **options)
    given = [pair for batch in batches for pair in batch]
    assert len(found) == len(given)
    for row, (image, cell) in zip(found, given, strict=True):
        expected = expected_of(image, cell)
        if isinstance(expected, list):
            vectors = [v if v is None else (v[0], v[1]) for v in row["features"]]
            assert vectors == expected
            codes = [error and error.partition(":")[0] for error in row["box_errors"]]
            assert codes == [None if place else "bad_box" for place in expected]
            assert (row["error"], row["width"], row["height"]) == (None, 12, 9)
        else:
            assert row["features"] is row["box_errors"] is None
            assert (row["error"] and row["error"].partition(":")[0]) == expected
    expected = [expected_of(*pair) for pair in given]
    boxes = [place for places in expected if isinstance(places, list) for place in places]
    assert all(size <= batch_size for size in sizes)
    assert counts["rows"] == len(given)
    assert counts["images"] == sum(isinstance(places, list) for places in expected)
    assert counts["nulls"] == expected.count(None)
    assert counts["boxes"] == sum(sizes) == len(boxes) - boxes.count(None)
    assert counts["bad_boxes"] == boxes.count(None)
    assert counts["batches"] == len(sizes)
    errors = sum(count for name, count in counts.items() if name.startswith("errors."))
    assert counts["rows"] == counts["images"] + counts["nulls"] + errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_batches_are_formed_across_images(schedule):
    engine = PixelEngine()
    cells = [BOXES[:3], [], BOXES[:5], None, BOXES[:4]]
    of_boxes([(series([PLACES] * 5), cells)], engine, batch_size=5, **PIXELS, **schedule)
    assert engine.batch_sizes == [5, 5, 2]


def test_empty_boxes_are_an_empty_list():
    counts: Any = defaultdict(float)
    batch = (series([PLACES, b"garbage"]), [[], np.array([], object)])
    empty, bad = of_boxes([batch], output="struct", counts=counts)
    assert (empty["features"], empty["box_errors"], empty["width"]) == ([], [], 12)
    assert bad["features"] is None
    assert bad["error"].startswith("unsupported_format")


def test_too_many_boxes_are_an_error_of_an_image_that_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("imagevec.images.reading._read", lambda *_, **__: pytest.fail("read"))
    cells = [[box(0, 0, 1, 1)] * (MAX_BOXES + 1)] * 2
    batch = (series([str(tmp_path / "none.png"), b"garbage"]), cells)
    for row in of_boxes([batch], output="struct"):
        assert row["features"] is row["box_errors"] is None
        assert row["error"] == "bad_box: 10,001 boxes, of which an image can have 10,000"


def test_several_layers_are_split():
    sizes = {"a.b": 1, "c": 2}
    cell = [box(3, 4, 1, 1), None, box(5, 6, 1, 1)]
    batch = (series([PLACES, b"garbage", PLACES]), [cell, cell, []])
    good, bad, empty = of_boxes([batch], layer_sizes=sizes)
    assert bad == {"a.b": None, "c": None}
    assert empty == {"a.b": [], "c": []}
    assert [v if v is None else v.tolist() for v in good["a.b"]] == [[3], None, [5]]
    assert [v if v is None else v.tolist() for v in good["c"]] == [[4, 0], None, [6, 0]]
    (struct, *_) = of_boxes([batch], layer_sizes=sizes, output="struct")
    assert list(struct["features"]) == ["a.b", "c"]
    assert struct["features"]["c"][0].tolist() == [4, 0]
    assert struct["box_errors"] == [None, "bad_box: null", None]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_on_error_raise_raises_the_error_of_a_box_and_of_an_image(schedule, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PLACES)
    good = (series([PLACES, None, PLACES]), [[box(0, 0, 1, 1)], [None], None])
    assert len(of_boxes([good], on_error="raise", **schedule)) == 3
    with pytest.raises(ImageError, match=f"^bad_box: {path}: outside the image of 12x9") as error:
        bad = (series([str(path)]), [[box(0, 0, 1, 1), box(50, 0, 1, 1)]])
        of_boxes([bad], on_error="raise", **schedule)
    assert error.value.code == "bad_box"
    with pytest.raises(ImageError, match="^unsupported_format: "):
        of_boxes([(series([b"garbage"]), [[]])], on_error="raise", **schedule)


@pytest.mark.parametrize("boxes", [7, "a", [7], [{"left": 1}]], ids=str)
def test_boxes_of_another_type_are_refused(boxes):
    with pytest.raises(OptionError, match="boxes must be of type"):
        of_boxes([(series([PLACES]), [boxes])])


def test_images_of_another_type_are_refused():
    with pytest.raises(OptionError, match="contains int values"):
        of_boxes([(series([7]), [[]])])


def test_function_without_boxes_refuses_two_columns():
    batch: Any = (series([PLACES]), series([[]]))
    with pytest.raises(OptionError, match="takes one column, and was given 2"):
        stream([batch], mean_engine, SMALL)


LARGE = encode(Image.new("RGB", (500, 500)))
LARGE_BYTES = 750_000


def peak_bytes(batches: Iterator[tuple[pd.Series, pd.Series]], **options: Any) -> int:
    """Returns the peak of Python's and NumPy's memory, with batches of 32."""
    out = box_stream(
        batches,
        mean_engine,
        spec_of(options.pop("preprocessing", SMALL)),
        execution_options(boxes="boxes", output="struct"),
        Schedule(32, **options),
    )
    tracemalloc.start()
    try:
        for _ in out:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("each", [box(0, 0, 9, 9), box(-9, 0, 9, 9)], ids=["good", "bad"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_few_decoded_images_are_held(schedule, each):
    batches = ((series([LARGE]), series([[each]])) for _ in range(25))
    threads = schedule.get("decode_threads", 1)
    assert peak_bytes(batches, **schedule) < (3 * threads + 3) * LARGE_BYTES


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_few_crops_of_an_image_are_held(schedule):
    cell = [box(0, 0, 9, 9)] * 1000
    crops = Preprocessing(resize_size=64, crop_size=64)  # 12 KB each
    batches = iter([(series([PLACES]), series([cell]))])
    assert peak_bytes(batches, preprocessing=crops, **schedule) < 5_000_000


def test_as_many_boxes_as_are_allowed():
    cell = [box(place % 12, place // 12 % 9, 1, 1) for place in range(MAX_BOXES)]
    (vectors,) = of_boxes([(series([PLACES]), [cell])], batch_size=512)
    places = np.stack(vectors)[:, :2]
    np.testing.assert_array_equal(places, [[each["left"], each["top"]] for each in cell])
