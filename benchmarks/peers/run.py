"""``make bench-peers``: compares Ray Data and Daft with this project, in one run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.approaches import Stage
from benchmarks.images import CACHE, ImageSet, from_folder, generated
from benchmarks.peers.environment import peers_python
from benchmarks.peers.task import Task
from benchmarks.results import BASELINE, Row
from benchmarks.run import RESULTS, Contestant, measure_stage, result_of
from benchmarks.spark import session

MODEL = "resnet50"
PEERS = {
    "Ray Data, actor pool": "benchmarks.peers.ray_data",
    "Daft, class UDF": "benchmarks.peers.daft_class",
}
OURS = ("features_udf, float32", "features_udf, bfloat16")
BATCH_SIZE = 32
LOWEST_COSINE = 0.999  # their decoders and transforms differ slightly from Pillow's
IMAGES_PER_SECOND = 9  # approximate speed of a peer; determines the length of its runs

ENVIRONMENT = {
    # One thread per copy of the model, as in Spark's workers.
    "OMP_NUM_THREADS": "1",
    # No telemetry, and no files in the user's home.
    "DO_NOT_TRACK": "true",
    "DAFT_ANALYTICS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a folder of images instead of generated ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="duration of a timed run")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; its figures are meaningless"
    )
    parser.add_argument(
        "--output", type=Path, help=f"output folder (default: {RESULTS}, except with --quick)"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 0
    count = 8 if arguments.quick else 64
    images = from_folder(arguments.images, count) if arguments.images else generated("small", count)
    result = measure(images, arguments.rounds, arguments.workers, arguments.seconds)
    output = arguments.output or (CACHE / "quick" if arguments.quick else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    (output / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    report.write(output / "peers.json")
    print(report.markdown(result))
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


def measure(images: ImageSet, rounds: int, workers: int, seconds: float) -> dict[str, Any]:
    python = peers_python()
    stage = Stage(MODEL, images.name, (BASELINE, *OURS), seconds=seconds / 2, rounds=rounds)
    passes = max(1, round(seconds * IMAGES_PER_SECOND / len(images.paths)))
    paths = [str(path.absolute()) for path in images.paths]
    task = Task(MODEL, paths * passes, workers, BATCH_SIZE, log="")

    def peers(reference: np.ndarray) -> list[Contestant]:
        return [_peer_run(python, name, task, stage.name, reference) for name in PEERS]

    with session(workers) as spark:
        rows = measure_stage(spark, stage, images.contents(), workers, peers)
        result = result_of(spark, rows, {stage.name: images.summary()})
    result["versions"] |= _peer_versions(python)
    result["notes"] = comparison(result)
    return result


def comparison(result: dict[str, Any]) -> list[str]:
    """Compares our float32 row with each peer, in each round."""
    seconds_per_image = {
        row["approach"]: [seconds / row["images"] for seconds in row["seconds"]]
        for row in result["rows"]
    }
    lines = []
    for peer in PEERS:
        pairs = zip(seconds_per_image[peer], seconds_per_image[OURS[0]], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"{OURS[0]} / {peer}: {statistics.median(ratios):.2f} ({rounds})")
    return lines


def _peer_run(python: Path, name: str, task: Task, stage: str, reference: np.ndarray) -> Contestant:
    row = Row(stage, name, "float32", task.workers, len(task.paths), start_seconds=[])
    row.required_cosine = LOWEST_COSINE

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("task.json", "output.json")]
            with_log = dataclasses.replace(task, log=str(Path(folder) / "log"))
            files[0].write_text(json.dumps(dataclasses.asdict(with_log)))
            subprocess.run(
                [python, "-W", "ignore", "-m", PEERS[name], *files],
                env={**os.environ, **ENVIRONMENT},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            figures = json.loads(files[1].read_text())
            row.compare(np.load(files[1].with_suffix(".npy")), reference)
        if row.start_seconds is not None:
            row.start_seconds.append(figures["start_seconds"])
        return figures["seconds"]

    return row, run


def _peer_versions(python: Path) -> dict[str, str]:
    code = "import json; from benchmarks.machine import versions; print(json.dumps(versions()))"
    output = subprocess.check_output([python, "-c", code], text=True)
    return {
        name: version for name, version in json.loads(output).items() if name in ("ray", "daft")
    }


if __name__ == "__main__":
    main()
