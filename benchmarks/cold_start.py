"""Measures startup: importing imagevec, and the time to the first vector of a new worker.

    python -m benchmarks.cold_start

Each figure is the median over three new processes. Writes ``results/cold_start.md``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pyspark.sql.pandas.functions import pandas_udf

from benchmarks.images import generated
from benchmarks.spark import image_frame, session, timed_seconds

RESULT = Path("benchmarks/results/cold_start.md")
RUNS = 3
DAEMON = {"spark.python.daemon.module": "imagevec.spark.daemon"}
NOTHING = ["-m", "benchmarks.cold_start", "--nothing"]
IMPORTS = ("import imagevec", "from imagevec import features_udf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--queries", action="store_true", help="measure one session and print its figures"
    )
    parser.add_argument(
        "--nothing", action="store_true", help="measure the first query of a UDF that does nothing"
    )
    parser.add_argument("--daemon", action="store_true", help="use imagevec.spark.daemon")
    arguments = parser.parse_args()
    if arguments.queries:
        print(*query_seconds(DAEMON if arguments.daemon else {}))
        return
    if arguments.nothing:
        print(nothing_seconds())
        return
    lines = ["| measurement | seconds |", "|---|---:|"]
    for code in IMPORTS:
        lines.append(f"| `{code}` | {statistics.median(import_seconds(code)):.2f} |")
    for daemon in (False, True):
        runs = [queries_in_a_new_process(daemon) for _ in range(RUNS)]
        making, again, first, second = (
            statistics.median(figures) for figures in zip(*runs, strict=True)
        )
        name = "`imagevec.spark.daemon`" if daemon else "Spark's daemon"
        lines += [
            f"| {name}: create the UDF (converted model in the cache) | {making:.2f} |",
            f"| {name}: create it again | {again:.3f} |",
            f"| {name}: first query, two new workers, one image each | {first:.2f} |",
            f"| {name}: second query | {second:.2f} |",
        ]
    nothing = statistics.median(float(_output(NOTHING).strip()) for _ in range(RUNS))
    lines.append(f"| Spark's daemon: first query of a UDF that does nothing | {nothing:.2f} |")
    table = "\n".join(lines) + "\n"
    RESULT.write_text(table)
    print(table)


def import_seconds(code: str) -> list[float]:
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return [float(_output(["-c", timed])) for _ in range(RUNS)]


def queries_in_a_new_process(daemon: bool) -> list[float]:
    arguments = ["-m", "benchmarks.cold_start", "--queries", *(["--daemon"] if daemon else [])]
    return [float(word) for word in _output(arguments).split()]


def query_seconds(conf: dict[str, str]) -> tuple[float, float, float, float]:
    """Returns the seconds to create the UDF, twice, and to run two queries (ResNet-50, float32)."""
    from imagevec import make_features_udf

    contents = generated("small").contents()[:2]
    with session(2, conf) as spark:
        frame = image_frame(spark, contents, 2)
        start = time.perf_counter()
        features = make_features_udf(weights="random")
        making = time.perf_counter() - start
        start = time.perf_counter()
        features = make_features_udf(weights="random")
        again = time.perf_counter() - start
        return making, again, timed_seconds(frame, features, 1), timed_seconds(frame, features, 1)


def nothing_seconds() -> float:
    """Returns the seconds that Spark itself needs for a first query with two new workers."""

    with session(2) as spark:

        @pandas_udf("array<float>")  # type: ignore[call-overload]
        def nothing(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
            for batch in batches:
                yield pd.Series([[0.0]] * len(batch))

        frame = image_frame(spark, generated("small").contents()[:2], 2)
        return timed_seconds(frame, nothing, 1)


def _output(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
