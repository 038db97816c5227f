"""Spark Connect: the same names, the same results, and no SparkContext anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pyspark.ml import Pipeline
from pyspark.ml.classification import LogisticRegression
from pyspark.sql import DataFrame, SparkSession

from imagevec import (
    ImageFeaturizer,
    ImageVectorizer,
    Metrics,
    OptionError,
    features_udf,
    make_features_udf,
    near_duplicates,
    nearest,
    provenance,
    register,
)
from imagevec.search import neighbours
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved, vector_of

IMAGES: list[Any] = [*(encode(photo(seed=seed)) for seed in range(6)), None, b"no image"]


@pytest.fixture(scope="module")
def frame(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(list(enumerate(IMAGES)), "id int, content binary")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    saved(tiny, path)
    return str(path)


def check(features: list[list[float] | None], **options: str) -> None:
    for image, vector in zip(IMAGES, features, strict=True):
        if image in (None, b"no image"):
            assert vector is None
        else:
            expected = vector_of(image, model=tiny, **options)
            assert vector == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_session_is_a_connect_session(spark: SparkSession) -> None:
    assert type(spark).__module__.startswith("pyspark.sql.connect")
    with pytest.raises(Exception, match="(?i)jvm|sparkContext|not supported"):
        spark.sparkContext  # noqa: B018


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_features_udf(frame: DataFrame, weights: str, engine: str) -> None:
    options: dict[str, Any] = {"weights": weights, "engine": engine}
    df = frame.withColumn("features", features_udf("content", model=tiny, **options))
    check([row.features for row in df.orderBy("id").collect()], **options)


def test_errors_are_told(frame: DataFrame) -> None:
    column = features_udf("content", model=tiny, weights="random", output="struct")
    rows = frame.select("id", column.alias("r")).orderBy("id").collect()
    assert [row.r.error and row.r.error.partition(":")[0] for row in rows] == [None] * 7 + [
        "unsupported_format"
    ]
    assert (rows[0].r.width, rows[0].r.height) == (80, 60)


def test_process_images(frame: DataFrame, weights: str) -> None:
    df = ImageVectorizer(model=tiny, weights=weights).process_images(frame)
    assert df.columns == ["id", "content", "features"]
    check([row.features for row in df.orderBy("id").collect()], weights=weights, engine="auto")


def test_process_images_asks_for_the_column(frame: DataFrame) -> None:
    with pytest.raises(OptionError, match="did you mean 'content'"):
        ImageVectorizer(model=tiny, weights="random").process_images(frame, "contents")


def test_sql(spark: SparkSession, frame: DataFrame, weights: str) -> None:
    spark.udf.register("image_features", make_features_udf(model=tiny, weights=weights))
    frame.createOrReplaceTempView("images")
    rows = spark.sql("select id, image_features(content) as f from images order by id").collect()
    check([row.f for row in rows], weights=weights, engine="auto")


def test_register_and_provenance(spark: SparkSession, frame: DataFrame, weights: str) -> None:
    register(spark, "registered_features", model=tiny, weights=weights)
    frame.createOrReplaceTempView("images")
    rows = spark.sql("select id, registered_features(content) as f from images order by id")
    check([row.f for row in rows.collect()], weights=weights, engine="auto")
    vectorizer = ImageVectorizer(model=tiny, weights=weights)
    made_of = provenance(vectorizer.process_images(frame))
    assert made_of.fingerprint == vectorizer.spec.fingerprint


def test_a_pipeline_is_fitted(frame: DataFrame, weights: str) -> None:
    featurizer = ImageFeaturizer(model=tiny, weights=weights, outputType="vector")
    labelled = frame.where("id < 6").selectExpr("id", "content", "id % 2 as label")
    fitted = Pipeline(stages=[featurizer, LogisticRegression(maxIter=5)]).fit(labelled)
    predictions = fitted.transform(labelled).select("prediction").collect()
    assert {row.prediction for row in predictions} <= {0.0, 1.0}
    assert len(predictions) == 6


def test_a_featurizer_of_names_is_saved_twice(spark: SparkSession, tmp_path: Path) -> None:
    place = str(tmp_path / "saved")
    ImageFeaturizer(model="resnet18", layer="logits").save(place)
    assert ImageFeaturizer.load(place).getLayer() == "logits"
    ImageFeaturizer(model="resnet50", normalize=True).write().overwrite().save(place)
    loaded = ImageFeaturizer.load(place)
    assert (loaded.getModel(), loaded.getLayer(), loaded.getNormalize()) == (
        "resnet50",
        "pooled",
        True,
    )
    with pytest.raises(Exception, match="PATH_ALREADY_EXISTS|already exists"):
        ImageFeaturizer().save(place)


def test_metrics_are_absent_and_harmless(frame: DataFrame, weights: str) -> None:
    metrics = Metrics()
    column = features_udf("content", metrics=metrics, model=tiny, weights=weights)
    check([row[0] for row in frame.orderBy("id").select(column).collect()], weights=weights)
    assert metrics.value == {}


def test_paths(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    paths = spark.createDataFrame(
        [(str(tmp_path / name),) for name in ("a.png", "b.png")], "p string"
    )
    column = features_udf("p", model=tiny, weights="random", output="struct")
    first, second = (row.r for row in paths.select(column.alias("r")).collect())
    assert first.features == pytest.approx(
        vector_of(IMAGES[0], model=tiny, weights="random"), rel=1e-4, abs=1e-6
    )
    assert second.error.startswith("unreadable_path")


@pytest.mark.parametrize("method", ["exact", "clustered"])
def test_search(spark: SparkSession, method: Literal["exact", "clustered"]) -> None:
    """As in one process, whichever side is the smaller one."""
    if method == "clustered":
        pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    vectors[30:] = vectors[:10] * 2
    rows = [(f"p{place:02d}", vector.tolist()) for place, vector in enumerate(vectors)]
    features = spark.createDataFrame(rows, "path string, features array<float>").repartition(3)
    indices, cosines = neighbours.nearest(vectors, vectors, 3)
    for count in (5, 40):
        queries = features.where(f"path < 'p{count:02d}'")
        found = nearest(queries, features, 3, method=method, recall=1.0)
        ranked = found.orderBy("query", "rank").collect()
        assert [int(row.neighbour[1:]) for row in ranked] == indices[:count].ravel().tolist()
        assert [row.cosine for row in ranked] == cosines[:count].ravel().tolist()
    groups = near_duplicates(features, 0.999, method=method).collect()
    pairs = {f"p{place:02d}": f"p{place - 30:02d}" for place in range(30, 40)}
    assert {row.path: row.group for row in groups} == pairs | {
        group: group for group in pairs.values()
    }
