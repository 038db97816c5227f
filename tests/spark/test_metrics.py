from __future__ import annotations

from typing import Any

import pytest
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.functions import array_to_vector
from pyspark.sql.functions import col

from imagevec import ImageVectorizer, Metrics, features_udf, make_features_udf, runtime
from imagevec.engines import backend
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import WITHOUT_BFLOAT16, run_python

IMAGES = [encode(photo(seed=seed)) for seed in range(5)] + [None, b"no image", b"", b"none either"]
OPTIONS: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
HAS_BFLOAT16 = "from imagevec.engines import openvino; print(openvino.has_bfloat16('cpu'))"
EXPECTED = {
    "rows": 9,
    "images": 5,
    "nulls": 1,
    "errors.empty": 1,
    "errors.unsupported_format": 2,
}


def counted(metrics: Metrics) -> dict[str, float]:
    return {name: count for name, count in metrics.value.items() if name in EXPECTED}


@pytest.mark.parametrize("isolate", [False, True])
def test_a_query_is_counted(frame, isolate):
    metrics = Metrics()
    assert metrics.value == {}
    column = features_udf("content", metrics=metrics, batch_size=2, isolate=isolate, **OPTIONS)
    frame(IMAGES, partitions=2).select(column).collect()
    assert counted(metrics) == EXPECTED
    assert metrics.value["batches"] >= 3
    steps = ("read", "decode", "preprocess", "forward")
    assert all(metrics.value[f"seconds.{step}"] > 0 for step in steps)
    assert metrics.value["tasks"] == 2
    accounted = sum(metrics.value[f"seconds.{step}"] for step in ("start", *steps))
    assert metrics.value["seconds.total"] >= (0 if isolate else accounted)


def test_queries_add_up_and_others_are_apart(frame):
    ours, others = Metrics(), Metrics()
    vectorizer = ImageVectorizer(**OPTIONS)
    for metrics in (ours, ours, others):
        vectorizer.process_images(frame(IMAGES), metrics=metrics).select("features").collect()
    assert counted(others) == EXPECTED
    assert counted(ours) == {name: 2 * count for name, count in EXPECTED.items()}


@pytest.mark.parametrize(
    "filtered",
    [
        lambda df: df.where("features IS NOT NULL"),
        lambda df: df.dropna(subset=["features"]),
        lambda df: df.where("size(features) > 0").selectExpr("features", "features[0] AS first"),
    ],
    ids=["where", "dropna", "several_uses"],
)
def test_a_filter_by_the_features_does_not_compute_them_twice(frame, filtered):
    metrics = Metrics()
    df = frame(IMAGES).withColumn("features", features_udf("content", metrics=metrics, **OPTIONS))
    assert len(filtered(df).collect()) == 5
    assert counted(metrics) == EXPECTED


def test_an_ordinary_function_is_computed_twice(frame):
    """Why the others count as not deterministic. Where this fails, Spark has mended it."""
    ordinary, once = Metrics(), Metrics()
    udfs = (
        make_features_udf(metrics=ordinary, **OPTIONS),
        make_features_udf(metrics=once, **OPTIONS).asNondeterministic(),
    )
    for udf in udfs:
        df = frame(IMAGES).withColumn("features", udf("content"))
        assert len(df.where("features IS NOT NULL").collect()) == 5
    assert ordinary.value["images"] == 2 * EXPECTED["images"]
    assert counted(once) == EXPECTED


def test_estimators_fit_on_stored_features_without_computing_them_again(frame):
    metrics = Metrics()
    df = frame(IMAGES).withColumn("features", features_udf("content", metrics=metrics, **OPTIONS))
    good = df.where("features IS NOT NULL").selectExpr("features", "rand(0) > 0.5 AS even")
    vectors = good.select(
        array_to_vector(col("features")).alias("features"), col("even").cast("int")
    )
    LogisticRegression(labelCol="even", maxIter=2).fit(vectors.persist())
    assert counted(metrics) == EXPECTED


def test_tasks_with_bfloat16_instructions_are_not_counted(frame):
    metrics = Metrics()
    column = features_udf("content", metrics=metrics, precision="bfloat16", **OPTIONS)
    frame(IMAGES).select(column).collect()
    native = backend("torch").has_bfloat16("cpu")
    assert metrics.value.get("tasks.float32_instead_of_bfloat16", 0) == (0 if native else 2)


def test_tasks_without_bfloat16_instructions_are_counted(spark, frame, monkeypatch):
    """The environment makes Spark start other workers, whose OpenVINO cannot use them."""
    pytest.importorskip("openvino")
    if "True" in run_python(HAS_BFLOAT16, **WITHOUT_BFLOAT16):
        pytest.skip("this OpenVINO cannot hide the instructions")
    for name, value in WITHOUT_BFLOAT16.items():
        monkeypatch.setitem(spark.sparkContext.environment, name, value)
    vectors = []
    options = {**OPTIONS, "engine": "openvino"}
    for precision in ("float32", "bfloat16"):
        metrics = Metrics()
        column = features_udf("content", metrics=metrics, precision=precision, **options)
        vectors.append([row.features for row in frame(IMAGES).select(column).collect()])
    assert vectors[0] == vectors[1]
    assert metrics.value["tasks"] == metrics.value["tasks.float32_instead_of_bfloat16"] == 2


def test_driver_of_local_workers_warns_of_float32(spark, monkeypatch, caplog):
    monkeypatch.setattr(runtime, "_has_bfloat16", runtime._has_bfloat16.__wrapped__)
    monkeypatch.setattr("imagevec.engines.devices.instructions", lambda: {"avx512_vnni"})
    features_udf("content", precision="float32", **OPTIONS)
    assert caplog.text == ""
    features_udf("content", precision="bfloat16", **OPTIONS)
    assert "torch finds no bfloat16 instructions to use" in caplog.text
