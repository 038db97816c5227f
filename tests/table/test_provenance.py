from __future__ import annotations

import json
from typing import Any

import pytest
from pyspark.sql import functions as F

import imagevec
from imagevec import (
    FingerprintError,
    ImageVectorizer,
    OptionError,
    check_comparable,
    features_udf,
    make_features_udf,
    provenance,
)
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved

IMAGES = [encode(photo(seed=seed)) for seed in range(2)]
OPTIONS: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}


def features(frame, **options):
    return frame(IMAGES).withColumn("features", features_udf("content", **{**OPTIONS, **options}))


def test_a_column_says_what_made_it(frame):
    made_of = provenance(features(frame, normalize=True))
    spec = ImageVectorizer(**OPTIONS, normalize=True).spec
    assert made_of.fingerprint == spec.fingerprint
    assert made_of.model == spec.model
    assert made_of.weights == "random"
    assert made_of.num_features == 8
    assert made_of.layer == "pooled"
    assert made_of.precision == "float32"
    assert made_of.normalize is True
    assert made_of.preprocessing.input_size == 224
    assert made_of.imagevec == imagevec.__version__


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": ("conv", "pooled")},
        {"background": "white", "value_range": (0, 4095)},
    ],
    ids=["one", "several", "decoding"],
)
def test_it_survives_parquet_and_renaming(frame, spark, tmp_path, options):
    df = features(frame, **options)
    df.withColumnRenamed("features", "f").write.parquet(str(tmp_path / "table"))
    read = spark.read.parquet(str(tmp_path / "table"))
    assert provenance(read, "f") == provenance(df)


def test_process_images_and_structs_say_it_too(frame):
    df = ImageVectorizer(**OPTIONS, output="struct").process_images(frame(IMAGES), output_col="f")
    assert provenance(df, "f").fingerprint == ImageVectorizer(**OPTIONS).spec.fingerprint


def test_how_vectors_are_computed_does_not_matter(frame):
    check_comparable(features(frame, batch_size=1), features(frame, engine="auto"))


def test_what_differs_is_told(frame, tmp_path):
    saved(tiny, tmp_path / "w.pth")
    others = {"normalize": True, "weights": str(tmp_path / "w.pth")}
    with pytest.raises(FingerprintError) as raised:
        check_comparable(features(frame), features(frame, **others))
    assert "normalize False and True" in str(raised.value)
    assert "weights 'random' and 'sha256:" in str(raised.value)
    assert "precision" not in str(raised.value)


def test_a_column_without_provenance(frame):
    df = frame(IMAGES).withColumn("features", make_features_udf(**OPTIONS)("content"))
    with pytest.raises(FingerprintError, match="has no provenance"):
        provenance(df)
    with pytest.raises(OptionError, match="did you mean 'features'"):
        provenance(df, "feature")


def test_provenance_in_a_comment(frame):
    """A table of Iceberg keeps no other metadata."""
    df = features(frame)
    metadata = df.schema["features"].metadata
    commented = df.withMetadata("features", {"comment": json.dumps(metadata)})
    assert provenance(commented) == provenance(df)
    check_comparable(commented, df)
    for comment in ("a vector", "[1]", "{}", "{"):
        with pytest.raises(FingerprintError, match="has no provenance"):
            provenance(df.withMetadata("features", {"comment": comment}))


@pytest.mark.parametrize("change", [{"input_size": 224}, {"precision": "float8"}])
def test_provenance_of_a_later_version_names_it(frame, change):
    spec = ImageVectorizer(**OPTIONS).spec
    metadata = {"imagevec": {**spec.metadata["imagevec"], "imagevec": "9.1.0", **change}}
    df = frame(IMAGES).withColumn("features", F.lit(1.0).alias("", metadata=metadata))
    with pytest.raises(FingerprintError, match=r"'features' was written by imagevec 9\.1\.0"):
        provenance(df)


def test_register(frame, spark):
    metrics = imagevec.Metrics()
    imagevec.register(spark, metrics=metrics, **OPTIONS)
    frame(IMAGES).createOrReplaceTempView("registered")
    rows = spark.sql("select id, image_features(content) as f from registered").collect()
    expected = [ImageVectorizer(**OPTIONS).extract_features(image) for image in IMAGES]
    assert metrics.value["images"] == len(IMAGES)
    assert [row.f for row in sorted(rows, key=lambda row: row.id)] == [
        pytest.approx(v, rel=1e-4, abs=1e-6) for v in expected
    ]


def test_a_column_is_replaced_whatever_its_case(frame):
    df = frame(IMAGES).selectExpr("id", "content", "1 as Features")
    df = ImageVectorizer(**OPTIONS).process_images(df)
    assert [name.lower() for name in df.columns] == ["id", "content", "features"]
    assert len(df.select("features").collect()[0][0]) == 8
