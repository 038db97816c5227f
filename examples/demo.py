"""Finds each photo's nearest neighbours, by the features of a real model, without a network.

Reads image files with Spark, turns them into feature vectors, writes these to Parquet, and shows
which photos are alike: on the terminal and in demo_output/contact_sheet.png.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from lite0 import write_weights
from pyspark.sql import DataFrame, SparkSession

from contact_sheet import draw_contact_sheet
from imagevec import features_udf
from photos import write_photos

OUTPUT = Path("demo_output")
NEIGHBOURS = 5  # a photo has 4 variants: the fifth shows how far away a stranger is


def main() -> None:
    write_photos(OUTPUT / "photos")
    weights = write_weights(OUTPUT / "efficientnet_lite0.safetensors")
    spark = start_spark()

    files = spark.read.format("binaryFile").load(str(OUTPUT / "photos"))
    result = features_udf(
        "content",
        model="timm/tf_efficientnet_lite0",
        weights=str(weights),
        normalize=True,
        output="struct",
    )
    (
        files.withColumn("result", result)
        .select("path", "result.features", "result.error")
        .write.mode("overwrite")
        .parquet(str(OUTPUT / "features.parquet"))
    )

    rows = spark.read.parquet(str(OUTPUT / "features.parquet"))
    report_bad_rows(rows)
    neighbours = find_neighbours(rows)
    report_neighbours(neighbours)
    draw_contact_sheet(neighbours, OUTPUT / "photos", OUTPUT / "contact_sheet.png")
    print(f"\nFeatures:      {OUTPUT / 'features.parquet'}")
    print(f"Contact sheet: {OUTPUT / 'contact_sheet.png'}")
    spark.stop()


def start_spark() -> SparkSession:
    os.environ["PYSPARK_PYTHON"] = sys.executable  # else the workers run the python3 of PATH
    quiet = Path(__file__).with_name("log4j2.properties").as_uri()
    builder = SparkSession.builder.master("local[*]").appName("imagevec demo")
    builder.config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={quiet}")
    builder.config("spark.ui.enabled", False)
    builder.config("spark.ui.showConsoleProgress", False)
    return builder.getOrCreate()


def report_bad_rows(rows: DataFrame) -> None:
    bad = rows.where("error is not null").collect()
    print(f"{rows.count()} files, {len(bad)} of them bad:")
    for row in bad:
        print(f"  {Path(row.path).name}: {row.error}")


def find_neighbours(rows: DataFrame) -> dict[str, list[tuple[str, float]]]:
    """Each photo's file name to the names and cosines of its nearest neighbours, nearest first."""
    good = rows.where("error is null").orderBy("path").collect()
    names = [Path(row.path).name for row in good]
    features = np.array([row.features for row in good])  # (N, D), each of length 1
    cosines = features @ features.T  # (N, N)
    np.fill_diagonal(cosines, -1)  # no one is their own neighbour
    nearest = np.argsort(-cosines)[:, :NEIGHBOURS]  # (N, NEIGHBOURS)
    return {
        name: [(names[other], cosines[index, other]) for other in nearest[index]]
        for index, name in enumerate(names)
        if "-" not in name  # a photo, not a variant
    }


def report_neighbours(neighbours: dict[str, list[tuple[str, float]]]) -> None:
    print(f"\nEach photo's {NEIGHBOURS} nearest neighbours, with cosines:")
    found = 0
    for name, near in neighbours.items():
        photo = Path(name).stem
        cells = [f"{Path(n).stem.removeprefix(f'{photo}-')} {cosine:.2f}" for n, cosine in near]
        print(f"  {photo:18}", *(f"{cell:16}" for cell in cells))
        found += all(other.startswith(f"{photo}-") for other, _ in near[:4])
    print(f"\n{found} of {len(neighbours)} photos have their 4 variants as their 4 nearest.")


if __name__ == "__main__":
    main()
