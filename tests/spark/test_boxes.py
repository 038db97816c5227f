"""The option ``boxes``, in every place that accepts options."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, FloatType

from imagevec import (
    ImageError,
    ImageFeaturizer,
    ImageVectorizer,
    Metrics,
    OptionError,
    features_udf,
    make_features_udf,
    provenance,
    register,
    register_model,
)
from imagevec.images.boxes import MAX_BOXES
from tests.helpers.factories import tiny
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import vector_of

TINY: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
PHOTOS = [photo(seed=seed) for seed in range(3)]
IMAGES = [encode(image) for image in PHOTOS]
BOX = "struct<left:double,top:double,width:double,height:double>"
CAT, DOG, OUTSIDE = (10.0, 5.0, 30.0, 40.0), (0.4, 20.6, 25.5, 30.0), (80.0, 0.0, 9.0, 9.0)
WHOLE = (-5.0, -5.0, 500.0, 500.0)

ROWS: list[tuple[Any, Any]] = [
    (IMAGES[0], [CAT, OUTSIDE, DOG, None]),
    (None, [CAT]),
    (IMAGES[1], None),
    (IMAGES[1], []),
    (b"no image", [DOG]),
    (IMAGES[2], [WHOLE, DOG, CAT]),
    (IMAGES[2], "too many"),
]


@functools.cache
def of_crop(place: int, box: Any, layer: str = "pooled") -> Any:
    """The vector of a box of ``PHOTOS[place]``, cropped by Pillow first."""
    if box in (None, OUTSIDE):
        return None
    left, top, width, height = box
    edges = (max(left, 0), max(top, 0), min(left + width, 80), min(top + height, 60))
    return vector_of(encode(PHOTOS[place].crop(edges)), layer=layer, **TINY)


def expected(layer: str = "pooled") -> list[Any]:
    return [
        [of_crop(0, box, layer) for box in (CAT, OUTSIDE, DOG, None)],
        None,
        None,
        [],
        None,
        [of_crop(2, box, layer) for box in (WHOLE, DOG, CAT)],
        None,
    ]


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    assert [row is None for row in found] == [row is None for row in wanted]
    for our, their in zip(found, wanted, strict=True):
        if our is not None:
            assert [vector is None for vector in our] == [vector is None for vector in their]
            pairs = [pair for pair in zip(our, their, strict=True) if pair[0] is not None]
            assert all(cosine(*pair) >= 0.9999 for pair in pairs)
            assert all(np.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in pairs)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_model("tests/boxes", tiny)


@pytest.fixture(scope="module")
def frame(spark: SparkSession) -> DataFrame:
    rows = [
        (place, image, None if boxes == "too many" else boxes)
        for place, (image, boxes) in enumerate(ROWS)
    ]
    df = spark.createDataFrame(rows, f"id int, content binary, boxes array<{BOX}>")
    too_many = F.array_repeat(F.expr("boxes[0]"), MAX_BOXES + 1)
    return df.withColumn(
        "boxes", F.when(F.col("id") == len(ROWS) - 1, too_many).otherwise(F.col("boxes"))
    )


SIDES = ("height", "width", "top", "left")


def features(df: DataFrame) -> list[Any]:
    return [row.features for row in df.orderBy("id").select("features").collect()]


@pytest.mark.parametrize("arrow_rows", [1, 3, 10_000], indirect=True)
def test_boxes_become_vectors_in_order(frame, arrow_rows):
    column = features_udf("content", boxes="boxes", batch_size=2, **TINY)
    df = frame.withColumn("features", column)
    assert df.schema["features"].dataType == ArrayType(ArrayType(FloatType()))
    assert_equal(features(df), expected())
    vectorizer: Any = ImageVectorizer(**TINY)
    assert provenance(df).fingerprint == vectorizer.spec.fingerprint


def test_boxes_may_be_an_expression(frame):
    corners = F.transform("boxes", lambda box: F.struct("id", *(box[side] for side in SIDES)))
    df = frame.withColumn("features", features_udf(F.col("content"), boxes=corners, **TINY))
    assert_equal(features(df), expected())


def test_struct_has_the_errors_of_images_and_boxes(frame):
    column = features_udf("content", boxes="boxes", output="struct", **TINY).alias("r")
    df = frame.select("id", column)
    assert df.schema["r"].dataType.simpleString() == (
        "struct<features:array<array<float>>,error:string,width:int,height:int,truncated:boolean,"
        "box_errors:array<string>>"
    )
    rows = [row.r for row in df.orderBy("id").collect()]
    assert_equal([row.features for row in rows], expected())
    codes = [row.error and row.error.partition(":")[0] for row in rows]
    assert codes == [None] * 4 + ["unsupported_format", None, "bad_box"]
    assert "10,001 boxes" in rows[6].error
    errors = [row.box_errors for row in rows]
    assert errors[1] is errors[2] is errors[4] is errors[6] is None
    assert errors[3] == []
    assert errors[5] == [None] * 3
    outside = "bad_box: outside the image of 80x60 pixels: left 80.0, top 0.0, width 9.0, "
    assert errors[0] == [None, outside + "height 9.0", None, "bad_box: null"]
    sizes = [(row.width, row.height) for row in rows]
    assert sizes == [(80, 60), (None, None), (None, None), (80, 60), (None, None), (80, 60)] + [
        (None, None)
    ]


@pytest.mark.parametrize("output", ["array", "struct"])
def test_several_layers_are_a_struct_of_arrays(frame, output):
    options: dict[str, Any] = {**TINY, "layer": ("pooled", "logits")}
    column = features_udf("content", boxes="boxes", output=output, **options)
    rows = [row[0] for row in frame.orderBy("id").select(column).collect()]
    found = rows if output == "array" else [row.features for row in rows]
    for layer in ("pooled", "logits"):
        assert_equal([row[layer] for row in found], expected(layer=layer))


@pytest.mark.parametrize("number", ["tinyint", "int", "bigint", "float", "decimal(9,3)"])
def test_numbers_of_any_type_are_sides(spark, number):
    sides = ", ".join(f"{side}: {number}" for side in SIDES)
    type = f"array<struct<label: string, {sides}, score: float>>"
    query = f"SELECT CAST(array(struct('cat', 40, 30, 5, 10, 0.5)) AS {type}) AS boxes"
    df = spark.sql(query).withColumn("content", F.lit(IMAGES[0]))
    assert df.dtypes[0][1] == type.replace(": ", ":").replace(", ", ",")
    found = ImageVectorizer(boxes="boxes", **TINY).process_images(df).collect()
    assert_equal([row.features for row in found], [[of_crop(0, CAT)]])


def test_images_may_be_paths_and_structs(spark, tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    files = spark.read.format("binaryFile").load(str(tmp_path))
    images = spark.read.format("image").load(str(tmp_path)).select("image")
    boxes = F.expr(f"CAST(array(struct(10, 5, 30, 40), null) AS array<{BOX}>)")
    for df, column in ((files, "path"), (files.select(F.struct("*").alias("file")), "file")):
        row = df.select(features_udf(column, boxes=boxes, **TINY).alias("f")).first()
        assert_equal([row.f], [[of_crop(0, CAT), None]])
    result = features_udf("image", boxes=boxes, output="struct", **TINY).alias("r")
    assert_equal([images.select(result).first().r.features], [[of_crop(0, CAT), None]])


def test_sql_function_takes_images_and_boxes(spark, frame):
    frame.createOrReplaceTempView("detections")
    query = "SELECT id, {}(content, boxes) AS features FROM detections"
    register(spark, "box_features", boxes="boxes", **TINY)
    assert_equal(features(spark.sql(query.format("box_features"))), expected())
    spark.udf.register("own_features", make_features_udf(boxes="any", **TINY))
    assert_equal(features(spark.sql(query.format("own_features"))), expected())
    register(spark, "features_of_images", **TINY)
    with pytest.raises(Exception, match="OptionError: .* takes one column, and was given 2"):
        spark.sql(query.format("features_of_images")).collect()


def test_wrong_type_of_boxes_fails_on_the_worker_with_words(frame):
    column = features_udf("content", boxes=F.expr("struct(1 AS left)"), **TINY)
    with pytest.raises(Exception, match="OptionError: .*boxes must be of type array<struct"):
        frame.select(column).collect()


WRONG_COLUMNS = {
    "array": "array(1)",
    "struct": "boxes[0]",
    "corners": "array(struct(1 AS x, 2 AS y, 3 AS w, 4 AS h))",
    "strings": "array(struct('1' AS left, 2 AS top, 3 AS width, 4 AS height))",
    "flags": "array(struct(true AS left, 2 AS top, 3 AS width, 4 AS height))",
    "text": "'1 2 3 4'",
}


@pytest.mark.parametrize("name", WRONG_COLUMNS)
def test_wrong_type_of_boxes_is_refused_before_the_job(frame, name, jobs_started):
    df = frame.withColumn(name, F.expr(WRONG_COLUMNS[name]))
    kind = dict(df.dtypes)[name]
    for use in (
        ImageVectorizer(boxes=name, **TINY).process_images,
        featurizer(boxes=name).transform,
    ):
        with pytest.raises(OptionError) as error:
            use(df)
        assert f"column {name!r} is of type {kind}: boxes must be of type" in str(error.value)
    assert jobs_started() == 0


def test_missing_column_of_boxes_is_refused_before_the_job(frame, jobs_started):
    for use in (
        ImageVectorizer(boxes="boxs", **TINY).process_images,
        featurizer(boxes="boxs").transform,
    ):
        with pytest.raises(OptionError, match="no column 'boxs': did you mean 'boxes'"):
            use(frame)
    assert jobs_started() == 0


def test_vectorizer_uses_the_column_of_that_name(frame):
    df = frame.withColumnRenamed("boxes", "all.Boxes")
    vectorizer = ImageVectorizer(boxes="ALL.boxes", **TINY)
    assert_equal(features(vectorizer.process_images(df)), expected())
    with pytest.raises(OptionError, match="use the name of a column"):
        ImageVectorizer(boxes=F.col("boxes"), **TINY)


def featurizer(**params: Any) -> ImageFeaturizer:
    return ImageFeaturizer(model="tests/boxes", weights="random", engine="torch", **params)


def test_featurizer_uses_the_column_and_keeps_it_when_saved(frame, tmp_path):
    path = str(tmp_path / "saved")
    featurizer(boxes="boxes").save(path)
    stage = ImageFeaturizer.load(path)
    assert stage.getBoxes() == "boxes"
    df = stage.transform(frame)
    assert stage.transformSchema(frame.schema) == df.schema
    assert_equal(features(df), expected())
    with pytest.raises(OptionError, match="outputType='vector' is not valid with boxes='boxes'"):
        stage.setOutputType("vector").transform(frame)


def test_metrics_count_images_and_boxes(frame):
    metrics = Metrics()
    column = features_udf("content", boxes="boxes", metrics=metrics, batch_size=2, **TINY)
    frame.coalesce(1).select(column).collect()
    counts = {name: n for name, n in metrics.value.items() if not name.startswith("seconds")}
    assert counts == {
        "tasks": 1,
        "rows": 7,
        "images": 3,
        "boxes": 5,
        "bad_boxes": 2,
        "nulls": 2,
        "errors.unsupported_format": 1,
        "errors.bad_box": 1,
        "batches": 3,
    }


def test_bad_box_fails_the_query_where_on_error_is_raise(frame):
    column = features_udf("content", boxes="boxes", on_error="raise", **TINY)
    assert len(frame.where("id = 5").select(column).collect()) == 1
    with pytest.raises(Exception, match="bad_box: outside the image of 80x60 pixels"):
        frame.where("id = 0").select(column).collect()


def test_vectors_of_one_image_without_spark(tmp_path: Path) -> None:
    vectorizer = ImageVectorizer(boxes="boxes", **TINY)
    path = tmp_path / "a.png"
    path.write_bytes(IMAGES[0])
    names = ("left", "top", "width", "height")
    forms: list[Any] = [
        [CAT, OUTSIDE, list(DOG)],
        [dict(zip(names, CAT, strict=True)), OUTSIDE, dict(zip(names, DOG, strict=True))],
        (
            Row(**dict(zip(names, CAT, strict=True))),
            None,
            Row(width=25.5, height=30, left=0.4, top=20.6),
        ),
        np.array([CAT, OUTSIDE, DOG]),
    ]
    for image in (IMAGES[0], str(path)):
        for boxes in forms:
            found: Any = vectorizer.extract_features(image, boxes=boxes)
            assert_equal([found], [[of_crop(0, CAT), None, of_crop(0, DOG)]])
            assert type(found) is type(found[0]) is list and type(found[0][0]) is float
    assert vectorizer.extract_features(IMAGES[0], boxes=[]) == []
    assert vectorizer.extract_features(b"no image", boxes=[CAT]) is None
    assert ImageVectorizer(**TINY).extract_features(IMAGES[0], boxes=[CAT]) == [of_crop(0, CAT)]
    layers: Any = ImageVectorizer(layer=("pooled", "logits"), **TINY)
    found = layers.extract_features(IMAGES[0], boxes=[CAT, OUTSIDE])
    assert found["logits"] == [of_crop(0, CAT, layer="logits"), None]
    with pytest.raises(OptionError, match=r"boxes='boxes' is a column of data frames: give"):
        vectorizer.extract_features(IMAGES[0])
    wrong: Any
    for wrong in (7, [7], [(1, 2, 3)], [("1", 2, 3, 4)], [{"left": 1}]):
        with pytest.raises(OptionError, match="boxes must be of type"):
            vectorizer.extract_features(IMAGES[0], boxes=wrong)
    with pytest.raises(ImageError, match="bad_box: outside"):
        ImageVectorizer(on_error="raise", **TINY).extract_features(IMAGES[0], boxes=[OUTSIDE])


def test_detections_are_joined_to_images(spark, tmp_path):
    """As in the documentation: a row of the table for each detection, in any order."""
    for place, image in enumerate(IMAGES):
        (tmp_path / f"{place}.png").write_bytes(image)
    found = [("1.png", "dog", *DOG), ("0.png", "cat", *CAT), ("1.png", "cat", *CAT)]
    detections = spark.createDataFrame(
        found, "path string, label string, left double, top double, width double, height double"
    )
    photos = spark.read.format("binaryFile").load(str(tmp_path))
    photos = photos.withColumn("path", F.element_at(F.split("path", "/"), -1))
    boxes = F.collect_list(F.struct("label", "left", "top", "width", "height")).alias("boxes")
    grouped = detections.groupBy("path").agg(boxes)
    vectors = photos.join(grouped, "path").select(
        "path", "boxes", features_udf("content", boxes="boxes", **TINY)
    )
    pairs = vectors.select("path", F.inline(F.arrays_zip("boxes", "features")))
    rows = pairs.select("path", "boxes.label", "features").collect()
    sides = {"cat": CAT, "dog": DOG}
    assert {(row.path, row.label) for row in rows} == {(path, label) for path, label, *_ in found}
    for row in rows:
        assert_equal([[row.features]], [[of_crop(int(row.path[0]), sides[row.label])]])
