"""``imagevec.extract`` with boxes: a row for each box, however a run ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec import (
    ExtractReport,
    ImageVecError,
    OptionError,
    extract,
    near_duplicates,
    nearest,
    provenance,
)
from imagevec.cli import main
from imagevec.search.gallery import write_gallery
from imagevec.search.similar import similar
from imagevec.table.sources import TableSource
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import vector_of
from tests.helpers.stops import stop_at
from tests.table.test_result import COLUMNS

MODEL: dict[str, Any] = {"model": tiny, "weights": "random"}
BOX = "struct<left: int, top: int, width: int, height: int, label: string>"
SCHEMA = f"id string, content binary, boxes array<{BOX}>, split string"
CAT, DOG, BIRD = (2, 3, 12, 10, "cat"), (10, 0, 20, 20, "dog"), (0, 5, 9, 9, "bird")
OUTSIDE = (500, 500, 9, 9, "lamp")

Extract = Callable[..., ExtractReport]
Rows = dict[tuple[str, int | None], dict[str, Any]]


def image(seed: int) -> bytes:
    return encode(photo(40, 30, seed=seed))


def frame(spark: SparkSession, rows: dict[str, tuple[Any, Any]]) -> DataFrame:
    """Makes a table from keys to images and boxes."""
    data = [(key, *row, "train") for key, row in rows.items()]
    return spark.createDataFrame(data, SCHEMA)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "dest"


@pytest.fixture
def run(spark: SparkSession, dest: Path) -> Extract:
    """Extracts features of the boxes of a table, or of images, into ``dest``."""

    def extract_to_dest(src: Any, **options: Any) -> ExtractReport:
        given = {"column": "content", "key": "id", "boxes": "boxes", "engine": "torch", **MODEL}
        options = {name: value for name, value in {**given, **options}.items() if value is not None}
        return extract(src, dest, spark=spark, **options)

    return extract_to_dest


def rows(folder: Path) -> Rows:
    """Returns the rows by key and number of the box: each is there once."""
    if not folder.is_dir():
        return {}
    found = ds.dataset(folder, format="parquet", ignore_prefixes=["_", "."])
    table = found.to_table().to_pylist() if found.files else []
    by_box = {(row["path"], row["box_number"]): row for row in table}
    assert len(by_box) == len(table)
    return by_box


def all_rows(dest: Path) -> Rows:
    features, errors = rows(dest), rows(dest / "_errors")
    assert not features.keys() & errors.keys()
    return features | errors


def assert_is_vector_of(row: dict[str, Any], seed: int, box: Any) -> None:
    left, top, width, height, _ = box
    crop = photo(40, 30, seed=seed).crop((left, top, left + width, top + height))
    expected = np.array(vector_of(encode(crop), **MODEL))
    found = np.array(row["features"])
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine >= 0.9999
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)


@pytest.fixture
def table(spark: SparkSession) -> DataFrame:
    """Images with three, one and no good boxes, and whatever has no boxes at all."""
    return frame(
        spark,
        {
            "three": (image(0), [CAT, OUTSIDE, DOG, None, BIRD]),
            "one": (image(1), [DOG]),
            "none": (image(2), [OUTSIDE]),
            "empty": (image(3), []),
            "null boxes": (image(4), None),
            "null image": (None, [CAT, DOG]),
            "bad": (b"no image", [CAT, DOG]),
        },
    )


KEYS_OF_TABLE = 7


def test_each_box_has_a_row(run: Extract, table: DataFrame, dest: Path) -> None:
    report = run(table, keep="split")
    assert (report.found, report.done_before, report.features) == (KEYS_OF_TABLE, 0, 4)
    assert report.errors == {"bad_box": 3, "unsupported_format": 1}
    assert report.nulls == 3
    done, bad = rows(dest), rows(dest / "_errors")
    assert done.keys() == {("three", 0), ("three", 2), ("three", 4), ("one", 0)}
    assert bad.keys() == {("three", 1), ("three", 3), ("none", 0)} | {
        (key, None) for key in ("empty", "null boxes", "null image", "bad")
    }
    for key, seed, box in ((("three", 0), 0, CAT), (("three", 2), 0, DOG), (("one", 0), 1, DOG)):
        assert_is_vector_of(done[key], seed, box)
        assert tuple(done[key]["box"].values()) == box
        assert (done[key]["width"], done[key]["height"], done[key]["error"]) == (40, 30, None)
        assert done[key]["truncated"] is False and done[key]["split"] == "train"
    assert {row["box_count"] for key, row in (done | bad).items() if key[0] == "three"} == {5}
    assert {row["length"] for key, row in (done | bad).items() if key[0] == "three"} == {
        len(image(0))
    }
    for row in (bad["three", 1], bad["three", 3], bad["none", 0]):
        assert row["error"].startswith("bad_box") and row["features"] is None
    assert tuple(bad["three", 1]["box"].values()) == OUTSIDE and bad["three", 3]["box"] is None
    assert bad["bad", None]["error"].startswith("unsupported_format:")
    for name in ("empty", "null boxes", "null image", "bad"):
        row = bad[name, None]
        assert [row[field] for field in ("features", "width", "box", "box_count")] == [None] * 4
        assert row["error"] is None or name == "bad"
    expected = [*COLUMNS, "box", "box_number", "box_count", "split"]
    assert list(done["one", 0]) == expected and list(bad["none", 0]) == expected
    assert not (dest / "_imagevec").exists()
    before = sorted(dest.rglob("*.parquet"))
    again = run(table, keep="split")
    assert (again.done_before, again.features, again.errors, again.nulls) == (7, 0, {}, 0)
    assert sorted(dest.rglob("*.parquet")) == before


def test_types_of_the_result(
    run: Extract, table: DataFrame, spark: SparkSession, dest: Path
) -> None:
    run(table)
    done = spark.read.parquet(str(dest))
    types = {field.name: field.dataType.simpleString() for field in done.schema}
    assert types["box"] == BOX.replace(": ", ":").replace(", ", ",")
    assert (types["box_number"], types["box_count"]) == ("int", "int")
    assert spark.read.parquet(str(dest / "_errors")).schema == done.schema
    assert provenance(done).model.endswith("tiny")


def test_several_layers(run: Extract, table: DataFrame, dest: Path) -> None:
    report = run(table, layer=("pooled", "logits"))
    assert (report.features, report.nulls) == (4, 3)
    assert report.errors == {"bad_box": 3, "unsupported_format": 1}
    row = rows(dest)["three", 2]
    crop = encode(photo(40, 30, seed=0).crop((10, 0, 30, 20)))
    for layer, size in (("pooled", 8), ("logits", 5)):
        expected = vector_of(crop, **MODEL, layer=layer)
        assert len(row["features"][layer]) == size
        np.testing.assert_allclose(row["features"][layer], expected, rtol=0.02, atol=1e-3)
    assert run(table, layer=("pooled", "logits")).done_before == KEYS_OF_TABLE


def test_other_boxes_replace_all_rows_of_their_image(
    run: Extract, spark: SparkSession, dest: Path
) -> None:
    first = {"a": (image(0), [CAT, OUTSIDE, DOG]), "b": (image(1), [DOG]), "c": (image(2), [])}
    run(frame(spark, first))
    before = all_rows(dest)
    second = {**first, "a": (image(0), [CAT, BIRD])}
    report = run(frame(spark, second))
    assert (report.done_before, report.features, report.errors) == (2, 2, {})
    after = all_rows(dest)
    assert after.keys() == {("a", 0), ("a", 1), ("b", 0), ("c", None)}
    assert_is_vector_of(after["a", 1], 0, BIRD)
    for key in (("b", 0), ("c", None)):
        assert after[key] == before[key]
    run(frame(spark, {**first, "a": (image(9), None), "c": (image(2), [CAT])}))
    last = all_rows(dest)
    assert last.keys() == {("a", None), ("b", 0), ("c", 0)}
    assert_is_vector_of(last["c", 0], 2, CAT)


def test_version_changes_with_the_image_and_with_each_field_of_each_box(
    spark: SparkSession,
) -> None:
    hen, no_left = (*BIRD[:4], "hen"), (None, *BIRD[:4])
    arrays: list[Any] = [[CAT, BIRD], [BIRD, CAT], [CAT, hen], [CAT], [CAT, None], [None, CAT]]
    arrays += [[], [no_left], [(*no_left[1:], None)], [CAT, CAT], None]
    rows: dict[str, Any] = {str(number): (image(1), boxes) for number, boxes in enumerate(arrays)}
    rows |= {f"other {number}": (image(2), boxes) for number, boxes in enumerate(arrays)}
    rows["null"] = (None, [CAT])

    def versions(df: DataFrame) -> dict[str, str]:
        source = TableSource(df, column="content", key="id", version=None, keep=(), boxes="boxes")
        return {row.path: row.version for row in source.keys().collect()}

    found = versions(frame(spark, rows))
    assert len(set(found.values())) == len(rows)
    spark.conf.set("spark.sql.jsonGenerator.ignoreNullFields", "false")
    try:
        assert versions(frame(spark, rows)) == found
    finally:
        spark.conf.unset("spark.sql.jsonGenerator.ignoreNullFields")


def test_version_column_decides_alone(run: Extract, spark: SparkSession, dest: Path) -> None:
    def edition(number: int, *boxes: Any) -> DataFrame:
        return frame(spark, {"a": (image(0), boxes)}).withColumn("edition", F.lit(number))

    run(edition(1, CAT, DOG), version="edition")
    assert run(edition(1, BIRD), version="edition").done_before == 1
    assert rows(dest).keys() == {("a", 0), ("a", 1)}
    assert run(edition(2, BIRD), version="edition").features == 1
    assert rows(dest).keys() == {("a", 0)}
    assert rows(dest)["a", 0]["version"] == "2"


@pytest.mark.parametrize("lost", ["features", "errors"])
def test_image_that_lacks_a_row_is_computed_again(
    run: Extract, spark: SparkSession, dest: Path, lost: str
) -> None:
    """A task commits two files: one of features, one of errors. It may die in between."""
    boxes = [CAT, OUTSIDE, DOG]
    table = frame(spark, {"a": (image(0), boxes), "b": (image(1), [DOG])}).coalesce(1)
    run(table)
    before = all_rows(dest)
    for path in (dest if lost == "features" else dest / "_errors").glob("*.parquet"):
        path.unlink()
    report = run(table)
    assert report.done_before == (0 if lost == "features" else 1)
    after = all_rows(dest)
    assert after.keys() == before.keys()
    for key, row in after.items():
        assert row["error"] == before[key]["error"]
    assert_is_vector_of(after["a", 2], 0, DOG)
    assert run(table).done_before == 2


@pytest.mark.parametrize("point", ["first publication", "first deletion", "all moves"])
def test_interrupt_leaves_each_box_once(
    run: Extract,
    spark: SparkSession,
    dest: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    boxes = [CAT, OUTSIDE, DOG, OUTSIDE]
    first = {str(key): (image(key), boxes[: key % 4 + 1]) for key in range(6)}
    run(frame(spark, first))
    changed = {**first, "2": (image(2), [OUTSIDE, BIRD]), "3": (image(30), boxes)}
    changed["new"] = (image(7), boxes)

    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    stop_at(point, interrupt, monkeypatch.setattr)
    with pytest.raises(KeyboardInterrupt):
        run(frame(spark, changed))
    run(frame(spark, changed))
    expected = {(key, number) for key, row in changed.items() for number in range(len(row[1]))}
    done = all_rows(dest)
    assert done.keys() == expected
    assert {key: row["error"] is None for key, row in done.items()} == {
        (key, number): changed[key][1][number] != OUTSIDE for key, number in expected
    }
    assert_is_vector_of(done["2", 1], 2, BIRD)
    assert_is_vector_of(done["3", 2], 30, DOG)
    assert run(frame(spark, changed)).done_before == 7
    assert not (dest / "_imagevec").exists()


def test_retry_errors_computes_only_images_with_passing_errors(
    run: Extract, spark: SparkSession, tmp_path: Path, dest: Path
) -> None:
    (tmp_path / "1.png").write_bytes(image(1))
    boxes = [CAT, OUTSIDE, DOG]
    names = ("1.png", "2.png", "3.png")
    data = [(str(tmp_path / name), boxes) for name in names]
    df = spark.createDataFrame(data, f"file string, boxes array<{BOX}>")
    options = {"column": "file", "key": None}
    report = run(df, **options)
    assert report.features == 2
    assert report.errors == {"unreadable_path": 2, "bad_box": 1}
    (tmp_path / "2.png").write_bytes(image(2))
    assert run(df, **options).done_before == 3
    report = run(df, **options, retry_errors=True)
    assert (report.done_before, report.features) == (1, 2)
    assert report.errors == {"unreadable_path": 1, "bad_box": 1}
    assert all_rows(dest).keys() == {
        *((str(tmp_path / name), number) for name in names[:2] for number in range(3)),
        (str(tmp_path / "3.png"), None),
    }
    other = df.withColumn("boxes", F.slice("boxes", 1, 1))  # paths alone have no version
    assert run(other, **options).done_before == 0
    assert {number for _, number in rows(dest)} == {0}


def test_boxes_of_spark_s_binary_files(
    run: Extract, spark: SparkSession, tmp_path: Path, dest: Path
) -> None:
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(image(seed))
    files = spark.read.format("binaryFile").load(str(tmp_path / "*.png"))
    box = F.expr("named_struct('left', 2L, 'top', 3.0D, 'width', 12, 'height', 10)")
    options = {"key": None}
    assert run(files.withColumn("boxes", F.array(box, box)), **options).features == 4
    assert run(files.withColumn("boxes", F.array(box, box)), **options).done_before == 2
    assert run(files.withColumn("boxes", F.array(box)), **options).features == 2
    assert_is_vector_of(rows(dest)[f"file:{tmp_path}/1.png", 0], 1, CAT)


def test_overwrite_and_compaction(
    run: Extract, table: DataFrame, spark: SparkSession, tmp_path: Path, dest: Path
) -> None:
    run(table)
    before = all_rows(dest)
    assert run(table, overwrite=True).features == 4
    assert all_rows(dest).keys() == before.keys()
    for part in ("", "_errors/"):
        copy = spark.read.parquet(f"{dest}/{part}").repartition(1)
        copy.write.parquet(str(tmp_path / "compact" / part))
    options = {"column": "content", "key": "id", "boxes": "boxes", "engine": "torch", **MODEL}
    report = extract(table, tmp_path / "compact", spark=spark, **options)
    assert report.done_before == KEYS_OF_TABLE


def test_rows_of_boxes_and_of_images_are_not_mixed(
    run: Extract, table: DataFrame, dest: Path
) -> None:
    run(table)
    said = "has a row for each box: set boxes, or use overwrite=True"
    with pytest.raises(OptionError, match=said):
        run(table, boxes=None)
    text = table.withColumn("boxes", F.transform("boxes", lambda box: box.dropFields("label")))
    with pytest.raises(OptionError, match="has the column 'box' of type struct<left"):
        run(text)
    assert run(table, boxes=None, overwrite=True).features == 5
    said = "has a row for each image: leave out boxes, or use overwrite=True"
    with pytest.raises(OptionError, match=said):
        run(table)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boxes": "box"}, "no column 'box': did you mean 'boxes'"),
        (
            {"boxes": "split"},
            r"column 'split' is of type string: .*array<struct<left",
        ),
        ({"boxes": "lefts"}, r"column 'lefts' is of type array<int>: .*array<struct<left"),
        (
            {"boxes": "words"},
            r"column 'words' is of type array<struct<left:string.*: .*array<struct<left",
        ),
        ({"boxes": "three"}, r"column 'three' is of type array<struct<left.*: .*array<struct<left"),
        ({"boxes": ""}, "the name of a column"),
        ({"keep": "box"}, "keep='box' is not valid: the result already has this column"),
        ({"keep": "Box_Number"}, "keep='Box_Number' is not valid: the result already has"),
        ({"keep": "box_count"}, "keep='box_count' is not valid: the result already has"),
    ],
)
def test_wrong_boxes_are_refused_before_the_job(
    run: Extract, table: DataFrame, dest: Path, options: dict[str, Any], said: str
) -> None:
    table = table.withColumns(
        {
            "lefts": F.col("boxes.left"),
            "words": F.transform("boxes", lambda box: box.withField("left", F.lit("1"))),
            "three": F.transform("boxes", lambda box: box.dropFields("height")),
        }
    )
    for name in ("box", "Box_Number", "box_count"):
        if name != options.get("boxes"):
            table = table.withColumn(name, F.lit(1))
    with pytest.raises(OptionError, match=said) as raised:
        run(table, **options)
    assert "\n" not in str(raised.value)
    assert not list(dest.rglob("*.parquet"))


def test_a_table_of_images_may_keep_a_column_named_box(
    run: Extract, table: DataFrame, dest: Path
) -> None:
    run(table.withColumn("box", F.lit(1)), boxes=None, keep="box")
    found = ds.dataset(dest, format="parquet", ignore_prefixes=["_", "."]).to_table()
    assert set(found["box"].to_pylist()) == {1}


def test_search_in_boxes_needs_a_key_for_each_box(
    run: Extract,
    table: DataFrame,
    spark: SparkSession,
    tmp_path: Path,
    dest: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(table)
    boxes = spark.read.parquet(str(dest))
    said = "the key 'three' occurs 3 times: .* for boxes, join path and box_number in one column"
    for search in (functools.partial(nearest, boxes), near_duplicates):
        with pytest.raises(OptionError, match=said):
            search(boxes)
    boxes = boxes.withColumn("key", F.concat_ws("#", "path", "box_number"))
    found = nearest(boxes, boxes, k=1, key="key").collect()
    assert {(row["query"], row["neighbour"]) for row in found} == {
        (key, key) for key in ("three#0", "three#2", "three#4", "one#0")
    }
    said = "has a row for each box, not for each image"
    with pytest.raises(OptionError, match=said):
        similar(str(dest), ["a.png"], 1)
    with pytest.raises(OptionError, match=said):
        write_gallery(dest, tmp_path / "gallery.html")
    arguments = ["duplicates", str(dest), "--out", str(tmp_path / "groups"), "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagevec.cli.session.spark_session", lambda master: nullcontext(spark))
        assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_files_and_shards_have_no_boxes(run: Extract, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(image(1))
    options: dict[str, Any] = {"column": None, "key": None}
    with pytest.raises(OptionError, match="boxes is only for tables: also give column"):
        run(tmp_path / "images", **options)
    with pytest.raises(ImageVecError, match="boxes is only for sources other than webdataset"):
        run(tmp_path / "images", **options, format="webdataset")
