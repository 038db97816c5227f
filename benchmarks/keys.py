"""Measures time and heap of extracting a table of a million keys with a small driver.

    python -m benchmarks.keys

The images have one pixel and the model is tiny, so that the keys dominate the cost. The heap is
that of Spark's JVM, which also runs the tasks in local mode. It is sampled after garbage
collections. Writes ``results/keys.md``.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from torch import nn

from benchmarks.images import CACHE
from benchmarks.spark import session
from imagevec import Preprocessing, extract, register_model

RESULT = Path("benchmarks/results/keys.md")
COUNTS = (250_000, 1_000_000)
HEAP = "1g"
_LOOK_EVERY_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="extract this many keys once and print JSON")
    arguments = parser.parse_args()
    if arguments.count:
        print(json.dumps(run(arguments.count)))
        return
    lines = [
        "| keys | run | seconds | images/s | peak live heap of the JVM, MB |",
        "|---:|---|---:|---:|---:|",
    ]
    for count in COUNTS:
        command = [sys.executable, "-m", "benchmarks.keys", "--count", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for name, figures in json.loads(done.stdout.splitlines()[-1]).items():
            seconds, images, heap = figures["seconds"], figures["images"], figures["heap_mb"]
            rate = f"{images / seconds:,.0f}" if images else ""
            lines.append(f"| {count:,} | {name} | {seconds:.0f} | {rate} | {heap:.0f} |")
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


def run(count: int) -> dict[str, dict[str, float]]:
    """Extracts all rows, then none, then a fifth of them after their files were deleted."""
    folder = CACHE / "keys"
    write_table(folder / f"{count}", count)
    dest = folder / "features"
    shutil.rmtree(dest, ignore_errors=True)
    register_model("pixels", pixels, preprocessing=Preprocessing(resize_size=32, crop_size=32))
    result = {}
    with session(2, {"spark.driver.memory": HEAP}) as spark:
        for name in ("all", "nothing to do", "a fifth deleted"):
            if name == "a fifth deleted":
                files = sorted(dest.glob("*.parquet"))
                for file in files[: len(files) // 5]:
                    file.unlink()
            heap = Heap(spark)
            with heap:
                report = extract(
                    str(folder / f"{count}"),
                    str(dest),
                    spark=spark,
                    column="image",
                    model="pixels",
                    weights="random",
                )
            figures = {"seconds": report.seconds, "images": report.features}
            result[name] = {**figures, "heap_mb": heap.highest / 1e6}
            print(name, result[name], file=sys.stderr, flush=True)
        keys = spark.read.parquet(str(dest)).select("path")
        assert (keys.count(), keys.distinct().count()) == (count, count)
    shutil.rmtree(dest)
    return result


class Heap:
    """Samples the live heap of a JVM while a block runs."""

    def __init__(self, spark: object) -> None:
        self._jvm = spark._jvm  # type: ignore[attr-defined]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.highest = 0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self._jvm.java.lang.System.gc()
            runtime = self._jvm.java.lang.Runtime.getRuntime()
            self.highest = max(self.highest, runtime.totalMemory() - runtime.freeMemory())
            if self._end.wait(_LOOK_EVERY_SECONDS):
                return


def pixels() -> nn.Module:
    """Builds a model that costs almost nothing."""
    return nn.Sequential(nn.Conv2d(3, 8, 32), nn.Flatten(), nn.Linear(8, 8))


def write_table(folder: Path, count: int, rows: int = 50_000) -> None:
    if folder.exists():
        return
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for start in range(0, count, rows):
        keys = [f"{key:09}" for key in range(start, min(start + rows, count))]
        images = [_png(colour) for colour in rng.integers(0, 256, (len(keys), 3), np.uint8)]
        table = pa.table({"path": keys, "image": images})
        parquet.write_table(table, temporary / f"{start:09}.parquet")
    temporary.rename(folder)


def _png(colour: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1), tuple(map(int, colour))).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes", file=sys.stderr)
