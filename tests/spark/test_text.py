from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pyspark.errors import PythonException
from pyspark.sql.functions import col

from imagevec import (
    FingerprintError,
    Metrics,
    OptionError,
    check_comparable,
    features_udf,
    nearest,
    provenance,
    text_features,
    text_features_udf,
)
from tests.helpers.images import encode, photo

OPTIONS: dict[str, Any] = {"model": "open_clip/tiny-vit", "weights": "random"}
TEXTS = ["a red shoe", None, "", "a dog 🐕", "word " * 100, None, "a red shoe", "a cat", "x"]


@pytest.fixture
def captions(clip, frame):
    return lambda texts, partitions=2: frame(texts, partitions, "string")


# PyTorch's workers build the model, and know none of the small ones.
@pytest.mark.parametrize(
    ("arrow_rows", "options"),
    [
        (1, {**OPTIONS, "engine": "openvino"}),
        (10_000, {**OPTIONS, "engine": "openvino"}),
        (3, {"model": "open_clip/ViT-S-32-alt", "weights": "random", "engine": "torch"}),
    ],
    indirect=["arrow_rows"],
)
def test_the_column_is_what_the_function_returns(captions, arrow_rows, options):
    column = text_features_udf("content", **options, batch_size=4)
    rows = captions(TEXTS).withColumn("features", column).orderBy("id").collect()
    assert [row.content for row in rows] == TEXTS
    assert [row.features is None for row in rows] == [text is None for text in TEXTS]
    given = [text for text in TEXTS if text is not None]
    found = np.array([row.features for row in rows if row.features is not None], np.float32)
    np.testing.assert_allclose(found, text_features(given, **options), atol=1e-5)


def test_it_is_counted(captions):
    metrics = Metrics()
    captions(TEXTS).select(text_features_udf("content", metrics=metrics, **OPTIONS)).collect()
    counts = {name: metrics.value.get(name) for name in ("rows", "texts", "nulls", "images")}
    assert counts == {"rows": 9, "texts": 7, "nulls": 2, "images": None}


@pytest.mark.parametrize(("kind", "value"), [("binary", b"a"), ("int", 1)])
def test_a_column_of_another_type_fails_the_query(clip, frame, kind, value):
    df = frame([value], type=kind).select(text_features_udf("content", **OPTIONS))
    with pytest.raises(PythonException, match="use a column of type string"):
        df.collect()


def test_texts_and_images_of_one_model_are_comparable(captions, frame, tmp_path):
    images = [encode(photo(64, 64, seed=seed)) for seed in range(5)]
    photos = frame(images).withColumn("features", features_udf("content", **OPTIONS))
    texts = captions(TEXTS).withColumn("features", text_features_udf("content", **OPTIONS))
    check_comparable(texts, photos)
    assert provenance(texts).model == provenance(photos).model == "open_clip/tiny-vit"
    assert provenance(texts).fingerprint != provenance(photos).fingerprint
    for precision in ("bfloat16", "float32"):  # of a text, another is comparable, too
        column = features_udf("content", **OPTIONS, precision=precision, normalize=True)
        check_comparable(texts, frame(images).withColumn("features", column))

    found = nearest(texts, photos, k=2, key="id").orderBy("query", "rank").collect()
    vectors = {row.id: np.array(row.features) for row in photos.collect()}
    for row in texts.where(col("content").isNotNull()).collect():
        cosines = {
            key: vector @ row.features / np.linalg.norm(vector) / np.linalg.norm(row.features)
            for key, vector in vectors.items()
        }
        expected = sorted(cosines, key=lambda key: -cosines[key])[:2]
        assert [hit.neighbour for hit in found if hit.query == row.id] == expected


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"model": "open_clip/tiny-mobile"}, "model 'open_clip/tiny-vit' and 'open_clip/tiny-mob"),
        ({"model": "resnet18"}, "model 'open_clip/tiny-vit' and 'resnet18'"),
    ],
    ids=["model", "kind"],
)
def test_those_of_other_models_are_not(captions, frame, other, differing):
    texts = captions(TEXTS).withColumn("features", text_features_udf("content", **OPTIONS))
    images = frame([encode(photo())]).withColumn(
        "features", features_udf("content", **{**OPTIONS, **other})
    )
    with pytest.raises(FingerprintError, match=differing):
        nearest(texts, images, key="id")
    with pytest.raises(FingerprintError, match="precision"):
        check_comparable(
            texts,
            captions(TEXTS).withColumn(
                "features", text_features_udf("content", **OPTIONS, precision="bfloat16")
            ),
        )


def test_a_wrong_option_is_named(clip, spark):
    with pytest.raises(OptionError, match="the option 'decode' is not known"):
        text_features_udf("caption", **OPTIONS, decode="scaled")  # type: ignore[call-arg]
