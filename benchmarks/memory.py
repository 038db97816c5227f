"""Measures the peak memory of a Python worker for one approach, in a separate Spark session.

``benchmarks.run`` starts it as a separate process, because a worker that has run other approaches
still holds their models.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
from typing import Any

import psutil

from benchmarks.approaches import find
from benchmarks.images import generated
from benchmarks.spark import image_frame, session, timed_seconds

SAMPLE_SECONDS = 0.1


def measure(approach: str, model: str, image_set: str, images: int, workers: int) -> dict[str, Any]:
    """Runs ``_measure`` in a new process."""
    arguments = [approach, model, image_set, str(images), str(workers)]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _measure(
    approach: str, model: str, image_set: str, images: int, workers: int
) -> dict[str, Any]:
    """Measures peak RSS after a quarter of the images and after all: it must not grow."""
    contents = generated(image_set).contents()
    passes = math.ceil(images / len(contents))
    with session(workers) as spark, PeakMemory() as peak:
        frame = image_frame(spark, contents, workers)
        features = find(approach).make(model)
        timed_seconds(frame, features, max(1, passes // 4))
        first = peak.megabytes
        timed_seconds(frame, features, passes)
        return {
            "approach": approach,
            "stage": f"{model}, {image_set}",
            "images": [max(1, passes // 4) * len(contents), passes * len(contents)],
            "peak_rss_mb": [round(first), round(peak.megabytes)],
        }


class PeakMemory:
    """Samples the largest RSS of any PySpark worker under this process, in a thread."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "pyspark.daemon" in process.cmdline():
                        self.megabytes = max(self.megabytes, process.memory_info().rss / 1e6)
                except psutil.Error:
                    continue  # it has ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("approach")
    parser.add_argument("model")
    parser.add_argument("image_set")
    parser.add_argument("images", type=int)
    parser.add_argument("workers", type=int)
    print(json.dumps(_measure(**vars(parser.parse_args()))))
