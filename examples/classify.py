"""Classifies photos with a logistic regression on the features of a pretrained model.

    python examples/classify.py FOLDER [--model MODEL] [--weights WEIGHTS]

Fits on FOLDER/gallery/<class>/*.jpg and tests on FOLDER/query/<class>/*.jpg. Then saves the fitted
pipeline and loads it in a new process, which must predict the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.feature import StringIndexer
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import element_at, split

from imagevec import ImageFeaturizer
from session import start_spark


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="folder of photos in gallery/<class> and query/<class>")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="name or file")
    parser.add_argument("--predict-with", help=argparse.SUPPRESS)  # in the new process
    arguments = parser.parse_args()
    spark = start_spark("imagevec classify")
    test = photos(spark, arguments.folder, "query")
    if arguments.predict_with:
        print(json.dumps(predictions(PipelineModel.load(arguments.predict_with), test)))
        return 0

    train = photos(spark, arguments.folder, "gallery")
    classes = StringIndexer(inputCol="class", outputCol="label")
    featurizer = ImageFeaturizer(
        model=arguments.model,
        weights=arguments.weights,
        outputType="vector",
        onError="raise",  # there is nothing to learn from a bad photo
    )
    model: Any = Pipeline(stages=[classes, featurizer, LogisticRegression(regParam=0.1)]).fit(train)
    predicted = predictions(model, test)
    right = sum(label == prediction for _, label, prediction in predicted)
    print(f"train: {train.count()} photos, {len(model.stages[0].labels)} classes")
    print(f"test: {len(predicted)} photos")
    print(f"accuracy: {right / len(predicted):.3f}")
    with tempfile.TemporaryDirectory() as temporary:
        model.save(f"{temporary}/model")
        again = predictions_in_a_new_process(f"{temporary}/model", arguments.folder)
    print(f"same predictions after loading in a new process: {again == predicted}")
    return int(again != predicted)


def photos(spark: SparkSession, folder: str, part: str) -> DataFrame:
    """Returns the photos in ``"gallery"`` or ``"query"``: binaryFile rows and their ``class``."""
    files = spark.read.format("binaryFile").load(f"{folder}/{part}/*/*.jpg")
    return files.withColumn("class", element_at(split("path", "/"), -2))


def predictions(model: PipelineModel, test: DataFrame) -> list[list[object]]:
    """Returns ``[path, label, prediction]`` of each photo, sorted by path."""
    rows = model.transform(test).select("path", "label", "prediction").collect()
    return sorted(list(row) for row in rows)


def predictions_in_a_new_process(model: str, folder: str) -> list[list[object]]:
    command = [sys.executable, __file__, folder, "--predict-with", model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    predicted: list[list[object]] = json.loads(done.stdout)
    return predicted


if __name__ == "__main__":
    sys.exit(main())
