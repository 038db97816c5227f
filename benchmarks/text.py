"""Compares ``text_features_udf`` with a row-wise UDF and a loop over open_clip.

    python -m benchmarks.text

Spark runs two workers of one thread each; the loop runs in one process of two threads. Weights are
seeded, and rounds are interleaved after a warm-up. Writes ``results/text.json`` and ``text.md``.
``make bench`` runs it too.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession

from benchmarks.images import dealt
from benchmarks.machine import machine, processor, versions
from benchmarks.results import BASELINE, Contestant, Row, derived, take_turns
from benchmarks.spark import collect_vectors, session, timed_seconds
from benchmarks.text_baselines import BATCH_SIZE, loop, rowwise_udf
from imagevec import text_features_udf

RESULTS = Path("benchmarks/results")
NAME = "ViT-B-32"
WORKERS = 2
TEXTS = 256
ROUNDS = 3
SECONDS = 8  # target duration of a timed run
REQUIRED_COSINE = {"float32": 0.9999, "bfloat16": 0.99}
LOOP = f"a loop over open_clip, batches of {BATCH_SIZE}"

_WORDS = ["a", "of", "with", "red", "small", "wooden", "old", "photo", "dress", "dog", "window"]

# Words per text: captions as in COCO, and more than the model's context holds.
LENGTHS = {"captions of 6 to 14 words": (6, 14), "texts of 90 words": (90, 90)}


def main() -> None:
    write(measure())


def measure() -> dict[str, Any]:
    """Measures all stages."""
    rows: list[Row] = []
    with session(WORKERS) as spark:
        for kind, (fewest, most) in LENGTHS.items():
            chance = random.Random(0)
            texts = [
                " ".join(chance.choices(_WORDS, k=chance.randint(fewest, most)))
                for _ in range(TEXTS)
            ]
            rows += _measure_stage(spark, f"{NAME}, {kind}", texts)
    failures = [failure for row in rows if (failure := row.failure)]
    if failures:
        raise SystemExit("\n".join(failures))
    return {"machine": machine(), "versions": versions(), "rows": derived(rows)}


def _measure_stage(spark: SparkSession, stage: str, texts: list[str]) -> list[Row]:
    print(f"\n{stage}", flush=True)
    frame = _frame(spark, texts)
    contestants: list[Contestant] = []
    alone = functools.partial(loop, NAME, threads=WORKERS)
    reference = alone(texts)
    for name, precision, column in _columns(spark):
        vectors = collect_vectors(frame, column)
        run = functools.partial(timed_seconds, frame, column)
        contestants.append(_contestant(stage, name, precision, run, vectors, reference))
    contestants.append(
        _contestant(
            stage,
            LOOP,
            "float32",
            lambda passes: _timed(alone, texts * passes),
            reference,
            reference,
        )
    )
    take_turns(contestants, ROUNDS)
    frame.unpersist(blocking=True)
    return [row for row, _ in contestants]


def _contestant(
    stage: str,
    name: str,
    precision: str,
    run: Callable[[int], float],
    vectors: np.ndarray,
    reference: np.ndarray,
) -> Contestant:
    """Returns a row and a function that times it, over the texts as often as needed."""
    passes = max(1, round(SECONDS / run(1)))
    row = Row(stage, name, precision, WORKERS, passes * TEXTS)
    row.required_cosine = REQUIRED_COSINE[precision]
    row.compare(vectors, reference)
    return row, lambda: run(passes)


def _columns(spark: SparkSession) -> list[tuple[str, str, Any]]:
    options: dict[str, Any] = {"model": f"open_clip/{NAME}", "weights": "random"}
    columns = [(BASELINE, "float32", rowwise_udf(spark, NAME))]
    ours: list[tuple[Any, Any]] = [
        ("torch", "float32"),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
    ]
    for engine, precision in ours:
        column = functools.partial(text_features_udf, engine=engine, precision=precision, **options)
        columns.append((f"text_features_udf, {engine}, {precision}", precision, column))
    return columns


def _timed(run: Callable[..., Any], texts: list[str]) -> float:
    start = time.perf_counter()
    run(texts)
    return time.perf_counter() - start


def _frame(spark: SparkSession, texts: list[str]) -> DataFrame:
    rows = [row for hand in dealt(list(enumerate(texts)), WORKERS) for row in hand]
    rdd = spark.sparkContext.parallelize(rows, WORKERS)
    frame = spark.createDataFrame(rdd, "index int, content string").cache()
    frame.count()
    return frame


def write(result: dict[str, Any]) -> None:
    """Writes ``results/text.json`` and ``.md``."""
    path = RESULTS / "text.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """Returns a table for each kind of text."""
    about, rows = result["machine"], result["rows"]
    parts = [
        f"Text tower of open_clip's {NAME}. {processor(about)}, "
        f"`local[{WORKERS}]`. Medians of {ROUNDS} interleaved rounds after a warm-up."
    ]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        parts.append(f"**{stage}**")
        lines = [
            "| approach | texts/s | speedup over row-wise UDF (by round) | lowest cosine |",
            "|---|---:|---|---:|",
        ]
        for row in rows:
            if row["stage"] == stage:
                ratios = row["ratio_to_baseline"]
                by_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                lines.append(
                    f"| {row['approach']} | {row['images_per_second']:.1f} "
                    f"| {statistics.median(ratios):.2f} ({by_round}) "
                    f"| {row['lowest_cosine']:.6f} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
