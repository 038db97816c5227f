"""Labels photos without training: each photo gets the label whose text is nearest to it.

    python examples/zero_shot.py FOLDER LABEL... [--model MODEL] [--weights WEIGHTS]

The weights must be trained on images and their captions. CLIP's authors report 63 % accuracy on
ImageNet's 1,000 classes with ViT-B/32, without any labelled image (Radford et al. 2021, Learning
Transferable Visual Models From Natural Language Supervision). ``--weights random`` works offline,
but gives meaningless labels.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from imagevec import features_udf, nearest, text_features_udf

PROMPT = "a photo of a {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="folder of photos")
    parser.add_argument("labels", nargs="+", metavar="LABEL")
    parser.add_argument("--model", default="open_clip/ViT-B-32")
    parser.add_argument("--weights", default="laion2b_s34b_b79k", help="tag, file, or random")
    arguments = parser.parse_args()
    model = {"model": arguments.model, "weights": arguments.weights}

    spark = start_spark()
    files = spark.read.format("binaryFile").load(arguments.folder)
    photos = files.select("path", features_udf("content", **model)).cache()
    prompts = [(label, PROMPT.format(label)) for label in arguments.labels]
    texts = spark.createDataFrame(prompts, "path string, prompt string")
    labels = texts.select("path", text_features_udf("prompt", **model))
    for row in nearest(photos, labels, k=1).orderBy("query").collect():
        print(f"{row.cosine:7.4f}  {row.neighbour:<20}  {row.query.rpartition('/')[2]}")


def start_spark() -> SparkSession:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    quiet = Path(__file__).with_name("log4j2.properties").as_uri()
    builder = SparkSession.builder.master("local[2]").appName("imagevec zero-shot")
    builder.config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={quiet}")
    builder.config("spark.ui.enabled", False)
    builder.config("spark.ui.showConsoleProgress", False)
    return builder.getOrCreate()


if __name__ == "__main__":
    main()
