"""``make bench``: runs all stages in interleaved rounds, and writes JSON, tables and charts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

from benchmarks import extract, memory, report, search, text
from benchmarks.approaches import MEMORY, STAGES, Stage, find, model_of
from benchmarks.ceiling import Ceiling, Engine
from benchmarks.images import CACHE, ImageSet, from_folder, generated
from benchmarks.machine import machine, versions
from benchmarks.results import Contestant, Row, derived, take_turns
from benchmarks.spark import (
    ARROW_BATCH_ROWS,
    collect_vectors,
    image_frame,
    session,
    timed_seconds,
)
from imagevec.engines import backend

RESULTS = Path("benchmarks/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a folder of images instead of generated ones")
    parser.add_argument("--rounds", type=int, help="rounds of each stage")
    parser.add_argument("--workers", type=int, default=2, help="N in local[N]")
    parser.add_argument(
        "--stages", nargs="*", help="only stages whose names contain one of these words"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; its figures are meaningless"
    )
    parser.add_argument(
        "--output", type=Path, help=f"output folder (default: {RESULTS}, except with --quick)"
    )
    arguments = parser.parse_args()
    words = arguments.stages or [""]
    stages = [stage for stage in STAGES if any(word in stage.name for word in words)]
    if arguments.images:
        stages = [dataclasses.replace(STAGES[0], image_set="folder", images=64)]
    if arguments.quick:
        stages = [dataclasses.replace(stage, images=4, seconds=0, rounds=1) for stage in stages]
    elif arguments.rounds:
        stages = [dataclasses.replace(stage, rounds=arguments.rounds) for stage in stages]
    if stages:
        measure_columns(stages, arguments)
    is_whole = not (arguments.quick or arguments.images)
    if is_whole and any(word in "extract" for word in words):
        extract.write(extract.measure(rounds=arguments.rounds or extract.ROUNDS))
    if is_whole and any(word in "search" for word in words):
        search.write(search.measure(list(search.CASES)))
    if is_whole and any(word in "text" for word in words):
        text.write(text.measure())


def measure_columns(stages: list[Stage], arguments: argparse.Namespace) -> None:
    """Measures the stages of ``features_udf`` and writes the result."""
    start = time.perf_counter()
    result = measure(stages, arguments.workers, arguments.images)
    if not (arguments.quick or arguments.images or arguments.stages):
        result["memory"] = measure_memory(arguments.workers)
    result["minutes"] = round((time.perf_counter() - start) / 60, 1)
    output = arguments.output or (CACHE / "quick" if arguments.quick else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    path = report.bench_file(output, result["machine"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    report.write_bench(output)
    print(report.markdown(result))
    print(f"{result['minutes']} minutes. Results are in {output}")
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


def measure(stages: list[Stage], workers: int, folder: Path | None = None) -> dict[str, Any]:
    """Measures all stages in one Spark session."""
    rows: list[Row] = []
    image_sets = {}
    with session(workers) as spark:
        for stage in stages:
            images = from_folder(folder, stage.images) if folder else _images(stage)
            image_sets[stage.name] = images.summary()
            rows += measure_stage(spark, stage, images.contents(), workers)
        return result_of(spark, rows, image_sets)


def result_of(spark: SparkSession, rows: list[Row], image_sets: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of the JSON file."""
    arrow = spark.conf.get("spark.sql.execution.pythonUDF.arrow.enabled")
    jvm: Any = spark._jvm
    return {
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "master": spark.sparkContext.master,
            "arrow_batch_rows": ARROW_BATCH_ROWS,
            "row_wise_udfs_through_arrow": arrow,
            "java": jvm.System.getProperty("java.version"),
        },
        "image_sets": image_sets,
        "rows": derived(rows),
        "failures": [failure for row in rows if (failure := row.failure)],
    }


def measure_stage(
    spark: SparkSession,
    stage: Stage,
    contents: list[bytes],
    workers: int,
    others: Callable[[np.ndarray], list[Contestant]] | None = None,
) -> list[Row]:
    """Warms up the approaches, compares their vectors, then times them in rounds.

    Args:
        others: Function from the baseline's vectors to further contestants.
    """
    print(f"\n{stage.name}: {len(contents)} images", flush=True)
    # A worker's cache may have dropped the model since its last run, and idle workers end after a
    # minute. A run over these few rows, before each timed run, loads the model in all workers.
    few = image_frame(spark, contents[:workers], workers)
    frames = {count: image_frame(spark, contents, count) for count in {1, workers}}
    contestants: list[Contestant] = []
    reference = None
    with ExitStack() as stack:
        ceilings = [
            Ceiling(Engine(engine, precision, model_of(stage.model, precision)), workers)
            for engine, precision in stage.ceilings
            if precision == _computed(precision)
        ]
        for name in stage.approaches:
            approach = find(name)
            features = approach.make(stage.model)
            timed_seconds(few, features, 1)
            vectors = collect_vectors(frames[workers], features)
            one_pass_seconds = timed_seconds(frames[workers], features, 1)
            reference = vectors if reference is None else reference
            for count in (workers, 1) if name in stage.one_worker else (workers,):
                seconds_one_pass = one_pass_seconds * workers / count
                passes = max(1, round(stage.seconds / seconds_one_pass))
                precision = _computed(approach.precision)
                row = Row(stage.name, name, precision, count, passes * len(contents))
                row.required_cosine = approach.lowest_cosine
                row.compare(vectors, reference)
                contestants.append((row, _spark_run(few, frames[count], features, passes)))
        for ceiling in ceilings:
            stack.enter_context(ceiling)
            contestants.append(_ceiling_run(stage, ceiling, workers))
        contestants += others(reference) if others and reference is not None else []
        take_turns(contestants, stage.rounds)
    for frame in (few, *frames.values()):
        frame.unpersist(blocking=True)
    return [row for row, _ in contestants]


def _computed(precision: str) -> str:
    """Returns the precision in which this machine computes what was asked for."""
    emulated = precision == "bfloat16" and not backend("openvino").has_bfloat16("cpu")
    return "float32" if emulated else precision


def measure_memory(workers: int) -> list[dict[str, Any]]:
    figures = []
    for approach, model, image_set, images in MEMORY:
        print(f"memory: {approach}, {images} images", flush=True)
        figures.append(memory.measure(approach, model, image_set, images, workers))
    return figures


def _images(stage: Stage) -> ImageSet:
    return generated(stage.image_set, stage.images)


def _spark_run(few: Any, frame: Any, features: Any, passes: int) -> Callable[[], float]:
    def run() -> float:
        timed_seconds(few, features, 1)
        return timed_seconds(frame, features, passes)

    return run


def _ceiling_run(stage: Stage, ceiling: Ceiling, workers: int) -> Contestant:
    engine = ceiling.engine
    name = f"forward pass only, {engine.name}, {engine.precision}"
    images = round(ceiling.images_per_second * max(1, stage.seconds / 2))
    row = Row(stage.name, name, engine.precision, workers, images, batch_size=ceiling.batch_size)
    return row, lambda: ceiling.seconds(images)


if __name__ == "__main__":
    main()
