"""The Spark session of the benchmarks, its images, and the timed action."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import array_repeat, explode, lit

from benchmarks.images import dealt

# Row-wise UDFs use it too if Spark passes their rows through Arrow.
ARROW_BATCH_ROWS = 64


@contextmanager
def session(workers: int, conf: Mapping[str, str] | None = None) -> Iterator[SparkSession]:
    """Starts ``local[workers]``: that many tasks at a time, one Python worker process each."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = (
        SparkSession.builder.master(f"local[{workers}]")
        .appName("imagevec benchmark")
        .config("spark.driver.memory", "4g")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", ARROW_BATCH_ROWS)
    )
    for name, value in (conf or {}).items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    try:
        yield spark
    finally:
        spark.stop()


def image_frame(spark: SparkSession, contents: list[bytes], partitions: int) -> DataFrame:
    """Returns a cached data frame ``(index, content)``, its rows dealt to the partitions."""
    rows = [row for hand in dealt(list(enumerate(contents)), partitions) for row in hand]
    rdd = spark.sparkContext.parallelize(rows, partitions)
    frame = spark.createDataFrame(rdd, "index int, content binary").cache()
    frame.count()
    return frame


def collect_vectors(frame: DataFrame, features: Any) -> np.ndarray:
    """Returns float32 ``(N, D)``, in the order of the images."""
    rows = frame.select("index", features("content").alias("features")).collect()
    by_index = sorted(rows, key=lambda row: row["index"])
    return np.array([row.features for row in by_index], dtype=np.float32)


def timed_seconds(frame: DataFrame, features: Any, passes: int) -> float:
    """Returns the seconds to compute all vectors of ``passes`` passes, without storing them."""
    repeated = frame.withColumn("pass", explode(array_repeat(lit(0), passes)))
    vectors = repeated.select(features("content").alias("features"))
    start = time.perf_counter()
    vectors.write.format("noop").mode("overwrite").save()
    return time.perf_counter() - start
