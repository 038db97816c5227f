"""The option ``boxes`` on Spark Connect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec import ImageFeaturizer, ImageVectorizer, OptionError, features_udf, register
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import vector_of

SQUEEZENET: dict[str, Any] = {"model": "squeezenet1_1", "weights": "random", "engine": "torch"}
BOX = "struct<left: int, top: int, width: int, height: int>"
PHOTO = photo()
ROWS = [
    (0, encode(PHOTO), [(10, 5, 30, 40), (80, 0, 9, 9), (50, 50, 90, 90)]),
    (1, None, [(10, 5, 30, 40)]),
    (2, encode(PHOTO), None),
    (3, encode(PHOTO), []),
    (4, b"no image", []),
]


@pytest.fixture(scope="module")
def frame(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(ROWS, f"id int, content binary, boxes array<{BOX}>")


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    crops = [(10, 5, 40, 45), (50, 50, 80, 60)]
    first, last = (vector_of(encode(PHOTO.crop(crop)), **SQUEEZENET) for crop in crops)
    return [[first, None, last], None, None, [], None]


def check(df: DataFrame, expected: list[Any]) -> None:
    found = [row.features for row in df.orderBy("id").collect()]
    assert found[1:] == expected[1:]
    assert [vector is None for vector in found[0]] == [False, True, False]
    for place in (0, 2):
        np.testing.assert_allclose(found[0][place], expected[0][place], rtol=1e-3, atol=1e-4)


def test_boxes_become_vectors(spark: SparkSession, frame: DataFrame, expected: list[Any]) -> None:
    for boxes in ("boxes", F.col("boxes")):
        column = features_udf("content", boxes=boxes, batch_size=2, **SQUEEZENET)
        check(frame.select("id", column), expected)
    check(ImageVectorizer(boxes="boxes", **SQUEEZENET).process_images(frame), expected)
    check(ImageFeaturizer(boxes="boxes", **SQUEEZENET).transform(frame), expected)
    register(spark, "box_features", boxes="boxes", **SQUEEZENET)
    frame.createOrReplaceTempView("detections")
    query = "SELECT id, box_features(content, boxes) AS features FROM detections"
    check(spark.sql(query), expected)


def test_struct_has_the_errors_of_boxes(frame: DataFrame) -> None:
    column = features_udf("content", boxes="boxes", output="struct", **SQUEEZENET).alias("r")
    rows = [row.r for row in frame.select("id", column).orderBy("id").collect()]
    codes = [error and error.partition(":")[0] for error in rows[0].box_errors]
    assert codes == [None, "bad_box", None]
    assert [row.box_errors for row in rows[1:]] == [None, None, [], None]
    assert rows[4].error.startswith("unsupported_format")


def test_type_of_boxes_is_checked_before_the_job(frame: DataFrame) -> None:
    df = frame.withColumn("numbers", F.expr("array(1)"))
    with pytest.raises(OptionError, match="of type array<int>: boxes must be of type"):
        ImageVectorizer(boxes="numbers", **SQUEEZENET).process_images(df)
