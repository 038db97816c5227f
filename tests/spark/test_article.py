"""The class that tutorials show, which cannot run, and the one that takes its place."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torchvision.models
from PIL import Image
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import udf
from pyspark.sql.types import ArrayType, FloatType
from torchvision import transforms

from imagevec import ImageVectorizer
from tests.helpers.images import encode, photo


class ArticleVectorizer:
    """Holds a session and a model, and makes a UDF of one of its methods."""

    def __init__(self):
        self.spark = SparkSession.builder.appName("ImageVectorizer").getOrCreate()
        self.model = torchvision.models.resnet50(weights=None)
        self.model.eval()
        self.transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def extract_features(self, image_bytes):
        image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
        with torch.no_grad():
            features = self.model(self.transform(image).unsqueeze(0))
        return features.squeeze().tolist()

    def process_images(self, df):
        extract = udf(self.extract_features, ArrayType(FloatType()))
        return df.withColumn("features", extract("content"))


IMAGES = [encode(photo(seed=seed), "JPEG") for seed in range(2)]


def test_the_articles_class_dies_with_spark_5063(frame):
    article = ArticleVectorizer()
    assert len(article.extract_features(IMAGES[0])) == 1000  # logits, not features
    with pytest.raises(Exception, match="CONTEXT_ONLY_VALID_ON_DRIVER"):
        article.process_images(frame(IMAGES)).collect()


def test_ours_runs_in_its_place(frame):
    vectorizer: Any = ImageVectorizer(model="resnet50", weights="random")
    rows = vectorizer.process_images(frame(IMAGES)).collect()
    assert [len(row.features) for row in rows] == [2048, 2048]
    assert len(vectorizer.extract_features(IMAGES[0])) == 2048
    assert rows[0].features == pytest.approx(vectorizer.extract_features(IMAGES[0]), rel=1e-3)


def test_ours_can_be_an_attribute_of_a_class_with_a_session(spark, frame):
    class Application:
        def __init__(self) -> None:
            self.spark = spark
            self.vectorizer = ImageVectorizer(model="squeezenet1_1", weights="random")

        def run(self) -> DataFrame:
            return self.vectorizer.process_images(frame(IMAGES))

    assert [len(row.features) for row in Application().run().collect()] == [512, 512]
