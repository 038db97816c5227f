"""Compares ``imagevec extract`` with ``features_udf`` and ``write.parquet``, on tables and files.

    python -m benchmarks.extract

Each run is a separate process. Its time is that of the whole process: starting Spark, reading from
disk, and writing vectors to disk. With Spark Connect, the process starts a local server, too.
``make bench`` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from pyspark.sql import SparkSession

from benchmarks.images import CACHE, generated
from benchmarks.machine import machine, processor, versions
from benchmarks.spark import session
from imagevec import extract, features_udf, recommended_conf

RESULTS = Path("benchmarks/results")
ROWS = 8_000
ROUNDS = 3
MODEL: dict[str, Any] = {
    "model": "mobilenet_v3_large",
    "weights": "random",
    "precision": "bfloat16",
}
FOLDERS = 8
_IMAGE_BYTES = 110_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--plain", nargs=3, metavar=("KIND", "SRC", "DEST"), help="do one run with features_udf"
    )
    parser.add_argument(
        "--extract", nargs=2, metavar=("SRC", "DEST"), help="do one run with extract, of a table"
    )
    parser.add_argument("--connect", action="store_true", help="do the run with Spark Connect")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.plain or arguments.extract:
        with _session(arguments.connect) as spark:
            if arguments.plain:
                plain(spark, *arguments.plain)
            else:
                src, dest = arguments.extract
                extract(src, dest, spark=spark, column="image", **MODEL)
        return
    write(measure(arguments.rows, arguments.rounds))


def write(result: dict[str, Any]) -> None:
    """Writes ``results/extract.json`` and ``.md``."""
    (RESULTS / "extract.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "extract.md").write_text(markdown(result) + "\n")
    print(markdown(result))


def measure(rows: int = ROWS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times each contestant in interleaved rounds."""
    folder = (CACHE / "extract" / str(rows)).resolve()
    double = folder.with_name(str(2 * rows))
    write_images(folder, rows)
    write_images(double, 2 * rows)
    dest = folder.with_name("features")
    contestants: dict[str, Callable[[], float]] = {
        "table, plain": lambda: _plain("table", folder / "table", dest),
        "table, extract": lambda: _extract(folder / "table", dest, "--column", "image"),
        "table, extract, nothing to do": lambda: _extract(
            folder / "table", dest, "--column", "image", again=True
        ),
        "table, extract, twice the rows": lambda: _extract(
            double / "table", dest, "--column", "image"
        ),
        "table on Connect, plain": lambda: _plain("table", folder / "table", dest, "--connect"),
        "table on Connect, extract": lambda: _extract_on_connect(folder / "table", dest),
        "files, plain": lambda: _plain("files", folder / "files", dest),
        "files, extract": lambda: _extract(folder / "files", dest, "--recursive"),
        "files, extract, nothing to do": lambda: _extract(
            folder / "files", dest, "--recursive", again=True
        ),
        "files, extract, twice the rows": lambda: _extract(double / "files", dest, "--recursive"),
    }
    print(f"\nextract: {rows} images", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    _plain("table", folder / "table", dest)  # converts the model and fills the caches
    for number in range(rounds):
        print(f" round {number + 1}", flush=True)
        for name, run in contestants.items():
            seconds[name].append(run())
            print(f"  {name}: {seconds[name][-1]:.1f} s", flush=True)
    shutil.rmtree(dest)
    return {
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "model": MODEL,
        "seconds": seconds,
    }


def markdown(result: dict[str, Any]) -> str:
    """Returns the tables of a result."""
    seconds, model = result["seconds"], result["model"]
    lines = [
        f"{result['rows']:,} JPEGs of 500x375 and 117 KB on disk to vectors on disk "
        f"({model['model']}, {model['precision']}). "
        f"{processor(result['machine'])}, `local[2]`. Each time is that of a whole process.",
        "",
    ]
    lines += ["| run | seconds | by round |", "|---|---:|---|"]
    for name, figures in seconds.items():
        by_round = ", ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {name} | {statistics.median(figures):.1f} | {by_round} |")
    lines += ["", "| ratio | median | by round |", "|---|---:|---|"]
    for kind in ("table", "table on Connect", "files"):
        whole = seconds[f"{kind}, extract"]
        ratios = {"extract / plain": (whole, seconds[f"{kind}, plain"])}
        if kind != "table on Connect":
            double = seconds[f"{kind}, extract, twice the rows"]
            ratios["twice the rows / the rows"] = (double, whole)
        for name, pairs in ratios.items():
            figures = [a / b for a, b in zip(*pairs, strict=True)]
            by_round = ", ".join(f"{figure:.2f}" for figure in figures)
            lines.append(f"| {kind}: {name} | {statistics.median(figures):.2f} | {by_round} |")
    return "\n".join(lines)


def write_images(folder: Path, rows: int) -> None:
    """Writes the same images to ``table/`` and ``files/``. The last bytes make each one unique."""
    done = folder / "done"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    contents = generated("small").contents()
    (folder / "table").mkdir(parents=True)
    schema = pa.schema([("path", pa.string()), ("image", pa.binary())])
    for number in range(FOLDERS):
        images = folder / "files" / f"{number}"
        images.mkdir(parents=True)
        names = [f"{index:07}.jpg" for index in range(number, rows, FOLDERS)]
        with parquet.ParquetWriter(folder / "table" / f"{number}.parquet", schema) as writer:
            for start in range(0, len(names), 100):
                some = names[start : start + 100]
                images_of = [
                    contents[int(name[:7]) % len(contents)] + name.encode() for name in some
                ]
                writer.write_table(pa.table({"path": some, "image": images_of}, schema))
                for name, content in zip(some, images_of, strict=True):
                    (images / name).write_bytes(content)
    done.touch()


@contextmanager
def _session(on_connect: bool) -> Iterator[SparkSession]:
    """Starts ``local[2]``, or a server of it."""
    conf = recommended_conf(image_bytes=_IMAGE_BYTES, executor_cores=1)
    if not on_connect:
        with session(2, conf) as spark:
            yield spark
        return
    os.environ["SPARK_TESTING"] = "1"  # the server then takes a free port
    builder = SparkSession.builder.remote("local[2]")
    for name, value in conf.items():
        builder = builder.config(name, value)
    # The server starts with these settings, and then warns that the client cannot set them.
    warnings.filterwarnings("ignore", message="Failed to set")
    spark = builder.getOrCreate()
    try:
        yield spark
    finally:
        spark.stop()


def plain(spark: SparkSession, kind: str, src: str, dest: str) -> None:
    """Does the same as ``extract`` with ``features_udf`` and ``write.parquet``."""
    if kind == "table":
        images = spark.read.parquet(src)
    else:
        reader = spark.read.format("binaryFile").option("recursiveFileLookup", "true")
        images = reader.load(src).withColumnRenamed("content", "image")
    images.select("path", features_udf("image", **MODEL)).write.parquet(dest)


def _plain(kind: str, src: Path, dest: Path, *flags: str) -> float:
    shutil.rmtree(dest, ignore_errors=True)
    return _seconds(["-m", "benchmarks.extract", "--plain", kind, str(src), str(dest), *flags])


def _extract_on_connect(src: Path, dest: Path) -> float:
    shutil.rmtree(dest, ignore_errors=True)
    return _seconds(["-m", "benchmarks.extract", "--extract", str(src), str(dest), "--connect"])


def _extract(src: Path, dest: Path, *flags: str, again: bool = False) -> float:
    if not again:
        shutil.rmtree(dest, ignore_errors=True)
    options = [word for name, value in MODEL.items() for word in (f"--{name}", value)]
    command = ["-m", "imagevec", "extract", str(src), str(dest), "--master", "local[2]", "--quiet"]
    return _seconds([*command, *options, *flags])


def _seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
