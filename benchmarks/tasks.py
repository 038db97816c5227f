"""Measures the fixed cost of a task: tasks that do nothing, and the same images in small tasks.

    python -m benchmarks.tasks

PySpark collects garbage in a worker after each task, which visits every object that imports
created. Workers that have run ``features_udf`` are therefore compared with new ones. Writes
``results/tasks.md``, for TCP and for Unix domain sockets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.functions import pandas_udf

from benchmarks.images import generated
from benchmarks.spark import image_frame, session
from imagevec import make_features_udf

RESULT = Path("benchmarks/results/tasks.md")
WORKERS = 2
TASKS = 200
ROUNDS = 5
MODEL: dict[str, Any] = {
    "model": "mobilenet_v3_large",
    "weights": "random",
    "precision": "bfloat16",
}
SMALL, LARGE = (16, 30), (2, 240)  # tasks, and images in each


def main() -> None:
    contents = generated("small").contents()
    images = [contents[i % len(contents)] for i in range(SMALL[0] * SMALL[1])]
    columns = [measure(images, sockets) for sockets in ("false", "true")]
    lines = ["| measurement | TCP | Unix sockets |", "|---|---:|---:|"]
    lines += [f"| {what} | {tcp} | {columns[1][what]} |" for what, tcp in columns[0].items()]
    table = "\n".join(lines) + "\n"
    RESULT.write_text(table)
    print(table)


def measure(images: list[bytes], unix_sockets: str) -> dict[str, str]:
    """Measures everything in a new session; returns figures by name."""
    found = {}
    with session(WORKERS, {"spark.python.unix.domain.socket.enabled": unix_sockets}) as spark:
        found["empty task, new workers"] = f"{nothing(spark):.0f} core-ms"
        features = make_features_udf(**MODEL)
        frames = {tasks: image_frame(spark, images, tasks) for tasks, _ in (SMALL, LARGE)}
        for frame in frames.values():
            seconds(frame, features)
        name = "empty task, workers that have run features_udf"
        found[name] = f"{nothing(spark):.0f} core-ms"
        rates = interleaved(frames, features, len(images))
    medians = {tasks: statistics.median(each) for tasks, each in rates.items()}
    for tasks, count in (SMALL, LARGE):
        name = f"MobileNetV3-Large, bfloat16, {tasks} tasks of {count} images"
        found[name] = f"{medians[tasks]:.0f} images/s"
    found["small tasks / large tasks"] = f"{medians[SMALL[0]] / medians[LARGE[0]]:.2f}"
    return found


def nothing(spark: SparkSession) -> float:
    """Returns the core-milliseconds of a task that returns its only row; median of the rounds."""

    @pandas_udf("long")  # type: ignore[call-overload]
    def same(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        yield from batches

    frame = spark.range(TASKS, numPartitions=TASKS).select(same("id").alias("id"))
    write(frame)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        write(frame)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) * WORKERS / TASKS


def interleaved(frames: dict[int, DataFrame], features: Any, images: int) -> dict[int, list[float]]:
    """Returns the images/s of each frame, measured in interleaved rounds."""
    rates: dict[int, list[float]] = {tasks: [] for tasks in frames}
    for _ in range(ROUNDS):
        for tasks, frame in frames.items():
            rates[tasks].append(images / seconds(frame, features))
    return rates


def seconds(frame: DataFrame, features: Any) -> float:
    start = time.perf_counter()
    write(frame.select(features("content").alias("features")))
    return time.perf_counter() - start


def write(frame: DataFrame) -> None:
    frame.write.format("noop").mode("overwrite").save()


if __name__ == "__main__":
    main()
