"""Compares ``nearest`` and ``near_duplicates`` with NumPy, ``nearestByJoin`` and MLlib's LSH.

    python -m benchmarks.search [CASE...]

Each case is a separate process with two Spark workers. ``make bench`` runs them all. Vectors are
drawn around centres, with a fixed seed. With ``pairs``, that many rows are near-copies of others,
at cosines around 0.97.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import parquet
from pyspark.ml.feature import BucketedRandomProjectionLSH
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from benchmarks.images import CACHE
from benchmarks.machine import machine, processor, versions
from benchmarks.memory import PeakMemory
from benchmarks.spark import session
from imagevec import near_duplicates, nearest
from imagevec.search import joins, neighbours

RESULTS = Path("benchmarks/results")
WORKERS = 2
K = 10
CONF = {"spark.sql.execution.arrow.maxRecordsPerBatch": "10000"}  # Spark's default
PAIR_COSINE = 0.97
_PART_ROWS = 25_000
_CENTRES = 2_000
_SPREAD = 1.0  # of the vectors around a centre, relative to the centre's length
_LOOK_EVERY_SECONDS = 1.0


def table(rows: int, features: int, pairs: int = 0, seed: int = 0) -> str:
    """Creates a Parquet table of ``path`` and ``features``, if needed, and returns its path."""
    folder = CACHE / "search" / f"{rows}x{features}-{pairs}-{seed}"
    if (folder / "_SUCCESS").exists():
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(12345).standard_normal((_CENTRES, features), np.float32)
    chance = np.random.default_rng(seed)
    for begin in range(0, rows, _PART_ROWS):
        count = min(_PART_ROWS, rows - begin)
        vectors = centres[chance.integers(0, _CENTRES, count)]
        vectors += _SPREAD * chance.standard_normal(vectors.shape, np.float32)
        # The last rows of each part are rotated copies of its first ones.
        copies = pairs * count // rows
        if copies:
            vectors[-copies:] = turned(vectors[:copies], chance)
        paths = [f"photos/{place:08d}.jpg" for place in range(begin, begin + count)]
        lists = pa.ListArray.from_arrays(
            np.arange(0, vectors.size + 1, features, dtype=np.int32), vectors.ravel()
        )
        parquet.write_table(
            pa.table({"path": paths, "features": lists}), folder / f"part-{begin:08d}.parquet"
        )
    (folder / "_SUCCESS").touch()
    return str(folder)


def turned(vectors: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Returns vectors at a cosine of about ``PAIR_COSINE`` to the given ones."""
    units = neighbours.unit_vectors(vectors)
    noise = neighbours.unit_vectors(chance.standard_normal(vectors.shape, np.float32))
    return PAIR_COSINE * units + math.sqrt(1 - PAIR_COSINE**2) * noise


def planted(rows: int, pairs: int) -> set[tuple[str, str]]:
    """Returns the paths of the planted pairs of such a table."""
    found = set()
    for begin in range(0, rows, _PART_ROWS):
        count = min(_PART_ROWS, rows - begin)
        copies = pairs * count // rows
        for place in range(copies):
            first, second = begin + place, begin + count - copies + place
            found.add((f"photos/{first:08d}.jpg", f"photos/{second:08d}.jpg"))
    return found


def array(folder: str) -> np.ndarray:
    """Reads the vectors of a table: float32 ``(N, D)``."""
    column = parquet.read_table(folder, columns=["features"]).column(0).combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def timed(frame: DataFrame) -> float:
    """Returns the seconds to compute all rows, without writing them."""
    start = time.perf_counter()
    frame.write.format("noop").mode("overwrite").save()
    return time.perf_counter() - start


class Heap:
    """Samples the peak of the JVM's live heap, after garbage collections."""

    def __init__(self, spark: SparkSession) -> None:
        self.megabytes = 0.0
        self._jvm: Any = spark._jvm
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Heap:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_SECONDS):
            self._jvm.System.gc()
            runtime = self._jvm.Runtime.getRuntime()
            used = runtime.totalMemory() - runtime.freeMemory()
            self.megabytes = max(self.megabytes, used / 1e6)


def bare_product(vectors: np.ndarray) -> float:
    """Returns the seconds to multiply all pairs of unit vectors in one process."""
    units = neighbours.unit_vectors(vectors)
    space = np.empty((2048, len(units)), np.float32)
    start = time.perf_counter()
    for begin in range(0, len(units), 2048):
        part = units[begin : begin + 2048]
        np.matmul(part, units.T, out=space[: len(part)])
    return time.perf_counter() - start


def exact() -> dict[str, Any]:
    """50,000 x 50,000 x 1,280, compared with one NumPy process of two threads."""
    folder = table(50_000, 1280)
    vectors = array(folder)
    figures: dict[str, list[float]] = {"product": [], "numpy": [], "nearest": []}
    with session(WORKERS, CONF) as spark:
        features = spark.read.parquet(folder)
        some = features.limit(5_000)
        timed(nearest(some, some, K))  # starts the workers and warms up the JVM
        for _ in range(2):
            figures["product"].append(bare_product(vectors))
            start = time.perf_counter()
            neighbours.nearest(vectors, vectors, K)
            figures["numpy"].append(time.perf_counter() - start)
            start = time.perf_counter()
            timed(nearest(features, features, K))
            figures["nearest"].append(time.perf_counter() - start)
    return figures


def queries() -> dict[str, Any]:
    """1,000 queries in tables of two sizes, with a JVM heap of 1 GB."""
    figures: dict[str, Any] = {}
    for rows in (250_000, 1_000_000):
        there = table(rows, 512, 10_000 if rows == 1_000_000 else 0)
        asked = table(1_000, 512, seed=1)
        with session(WORKERS, {**CONF, "spark.driver.memory": "1g"}) as spark:
            with PeakMemory() as peak, Heap(spark) as heap:
                start = time.perf_counter()
                timed(nearest(spark.read.parquet(asked), spark.read.parquet(there), K))
                seconds = time.perf_counter() - start
            figures[f"{rows}"] = {
                "seconds": seconds,
                "worker_rss_mb": peak.megabytes,
                "heap_mb": heap.megabytes,
            }
    return figures


def spark_join() -> dict[str, Any]:
    """The cost of a pair: ``nearestByJoin`` on 2,000 x 2,000, ``nearest`` on 50,000 x 50,000."""
    figures: dict[str, Any] = {}
    with session(WORKERS, CONF) as spark:
        for features in (512, 1280):
            few, asked = table(2_000, features, seed=2), table(2_000, features, seed=3)
            many = table(50_000, features)
            left, right = spark.read.parquet(asked), spark.read.parquet(few)
            ours, theirs = nearest(left, right, K), by_join(left, right)
            timed(ours)
            join_seconds = timed(theirs)
            frame = spark.read.parquet(many)
            start = time.perf_counter()
            timed(nearest(frame, frame, K))
            seconds = time.perf_counter() - start
            figures[f"{features}"] = {
                "nearestByJoin_ns_a_pair": join_seconds / 2_000**2 * 1e9,
                "nearest_ns_a_pair": seconds / 50_000**2 * 1e9,
                "ratio": join_seconds / 2_000**2 / (seconds / 50_000**2),
                "same": share_of_same(ours, theirs),
            }
    return figures


def same_as_numpy() -> dict[str, Any]:
    """500 queries in 200,000 x 512, compared with a float64 product and sort in one process."""
    there, asked = table(200_000, 512), table(500, 512, seed=4)
    with session(WORKERS, CONF) as spark:
        result = nearest(spark.read.parquet(asked), spark.read.parquet(there), K)
        found = result.orderBy("query", "rank").collect()
    paths = sorted(parquet.read_table(there, columns=["path"]).column(0).to_pylist())
    place = {path: index for index, path in enumerate(paths)}
    indices = np.array([place[row.neighbour] for row in found]).reshape(-1, K)
    first, second = array(asked).astype(np.float64), array(there).astype(np.float64)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    cosines = first @ second.T
    plain = np.argsort(-cosines, axis=1, kind="stable")[:, :K]
    apart = np.take_along_axis(cosines, plain, 1) - np.take_along_axis(cosines, indices, 1)
    one_process, _ = neighbours.nearest(array(asked), array(there), K)
    return {
        "same as one process of `neighbours.nearest`": float((indices == one_process).mean()),
        "same as a float64 product and sort": float((indices == plain).mean()),
        "same as a float64 product and sort, up to ties of 2**-20": float(
            (np.abs(apart) < 2.0**-20).mean()
        ),
    }


def by_join(queries: DataFrame, features: DataFrame) -> DataFrame:
    """Does the same with ``nearestByJoin`` of Spark 4.2."""
    left = queries.select(F.col("path").alias("query"), F.col("features").alias("asked"))
    cosine = F.vector_cosine_similarity("asked", "features")
    joined = left.nearestByJoin(features, cosine, K, "exact", "similarity")
    return joined.select("query", F.col("path").alias("neighbour"), cosine.alias("cosine"))


def share_of_same(ours: DataFrame, theirs: DataFrame) -> float:
    """Returns the share of neighbours found by both; an equally near one counts as the same."""
    first = {(row.query, row.neighbour): row.cosine for row in ours.collect()}
    last: dict[str, float] = {}
    for (query, _), cosine in first.items():
        last[query] = min(cosine, last.get(query, 2))
    rows = theirs.collect()
    same = [
        (row.query, row.neighbour) in first or abs(row.cosine - last[row.query]) < 2e-6
        for row in rows
    ]
    return sum(same) / len(first)


def duplicates() -> dict[str, Any]:
    """Near-duplicates of 1,000,000 x 512 with 10,000 planted pairs, clustered."""
    rows, pairs = 1_000_000, 10_000
    folder = table(rows, 512, pairs)
    with session(WORKERS, {**CONF, "spark.driver.memory": "1g"}) as spark:
        features = spark.read.parquet(folder)
        with PeakMemory() as peak, Heap(spark) as heap, Compared() as compared:
            start = time.perf_counter()
            groups = near_duplicates(features, 0.95, method="clustered").collect()
            seconds = time.perf_counter() - start
    group_of = {row.path: row.group for row in groups}
    true = planted(rows, pairs)
    found = sum(group_of.get(a, 1) == group_of.get(b, 2) for a, b in true)
    return {
        "seconds": seconds,
        "found": found / len(true),
        "groups": len(set(group_of.values())),
        "compared": compared.pairs / (rows * (rows - 1) / 2),
        "worker_rss_mb": peak.megabytes,
        "heap_mb": heap.megabytes,
    }


class Compared:
    """Counts the pairs that clustered search compares, including centroids."""

    def __init__(self) -> None:
        self.pairs = 0.0

    def __enter__(self) -> Compared:
        self._original = joins.cells_for_pairs

        def counted(space: Any, vectors: Any, min_cosine: float) -> Any:
            cells = self._original(space, vectors, min_cosine)
            arrays = cells.arrays()
            members = np.diff(arrays["begins"]).astype(float)
            visitors = np.diff(arrays["visits_begin"]).astype(float)
            self.pairs = float((members * (members / 2 + visitors)).sum())
            self.pairs += vectors.rows * len(members)
            return cells

        joins.cells_for_pairs = counted
        return self

    def __exit__(self, *_: object) -> None:
        joins.cells_for_pairs = self._original


def lsh() -> dict[str, Any]:
    """Near-duplicates of 20,000 x 512 with 1,000 planted pairs, by MLlib's LSH and clustered."""
    rows, pairs = 20_000, 1_000  # LSH shuffles 0.4 of all pairs, with their vectors
    folder = table(rows, 512, pairs)
    true = planted(rows, pairs)
    figures: dict[str, Any] = {}
    with session(WORKERS, CONF) as spark:
        features = spark.read.parquet(folder)
        near_duplicates(features, 0.95, method="clustered").count()  # warms up the JVM
        start = time.perf_counter()
        groups = near_duplicates(features, 0.95, method="clustered").collect()
        figures["clustered"] = {"seconds": time.perf_counter() - start}
        group_of = {row.path: row.group for row in groups}
        found = sum(group_of.get(a, 1) == group_of.get(b, 2) for a, b in true)
        figures["clustered"]["recall"] = found / len(true)
        units = features.withColumn("features", F.vector_normalize("features"))
        units = units.withColumn(
            "features", array_to_vector(F.col("features").cast("array<double>"))
        )
        # By the formula of Datar et al. 2004, these find 0.966 of the pairs at a cosine of 0.97,
        # and 0.42 of the orthogonal pairs. MLlib projects onto unit vectors.
        tables, width = 3, 0.6 / math.sqrt(512)
        model = BucketedRandomProjectionLSH(
            inputCol="features",
            outputCol="hashes",
            numHashTables=tables,
            bucketLength=width,
            seed=0,
        ).fit(units)
        some = units.sample(fraction=0.25, seed=0)
        model.approxSimilarityJoin(some, some, 0.3).count()  # warms up the JVM
        start = time.perf_counter()
        near = model.approxSimilarityJoin(units, units, math.sqrt(2 - 2 * 0.95))
        near = near.select("datasetA.path", F.col("datasetB.path").alias("other"))
        rows_near = near.where("path < other").collect()
        figures[f"LSH, {tables} tables, buckets of {width:.3f}"] = {
            "seconds": time.perf_counter() - start,
            "recall": len({(row.path, row.other) for row in rows_near} & true) / len(true),
        }
    return figures


def clustered() -> dict[str, Any]:
    """10,000 queries in 1,000,000 x 512, clustered and exact."""
    with session(WORKERS, CONF) as spark:
        asked = spark.read.parquet(table(10_000, 512, seed=5))
        there = spark.read.parquet(table(1_000_000, 512, 10_000))
        figures: dict[str, Any] = {}
        start = time.perf_counter()
        result = nearest(asked, there, K, method="clustered").collect()
        figures["clustered"] = {"seconds": time.perf_counter() - start}
        start = time.perf_counter()
        true = {(row.query, row.neighbour) for row in nearest(asked, there, K).collect()}
        figures["exact"] = {"seconds": time.perf_counter() - start, "recall": 1.0}
        found = {(row.query, row.neighbour) for row in result}
        figures["clustered"]["recall"] = len(found & true) / len(true)
    return figures


def libraries() -> dict[str, Any]:
    """The ten nearest of 4,096 x 50,000 x 1,280, by imagevec on NumPy and by faiss."""
    import faiss

    vectors = neighbours.unit_vectors(array(table(50_000, 1280)))
    some = vectors[:4096]
    figures: dict[str, list[float]] = {"product": [], "numpy": [], "faiss": []}
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    contestants: dict[str, Callable[[], Any]] = {
        "product": lambda: [some[i : i + 512] @ vectors.T for i in range(0, len(some), 512)],
        "numpy": lambda: neighbours.nearest_units(some, vectors, K),
        "faiss": lambda: index.search(some, K),
    }
    for _ in range(3):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            figures[name].append(time.perf_counter() - start)
    return figures


def similar() -> dict[str, Any]:
    """``imagevec similar`` on a table of 200,000 x 1,280, for an image in the table."""
    folder = table(200_000, 1280)
    command = [
        sys.executable,
        "-m",
        "imagevec",
        "similar",
        folder,
        "--query",
        "photos/00123456.jpg",
    ]
    seconds, peak = [], 0
    for _ in range(3):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    peak = max(peak, psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.02)
        seconds.append(time.perf_counter() - start)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": seconds, "rss_mb": peak / 1e6}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "libraries": libraries,
    "exact": exact,
    "queries": queries,
    "spark_join": spark_join,
    "same_as_numpy": same_as_numpy,
    "clustered": clustered,
    "duplicates": duplicates,
    "lsh": lsh,
    "similar": similar,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--case", help="run one case in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case]()))
        return
    write(measure(arguments.cases))


def measure(cases: list[str]) -> dict[str, Any]:
    """Runs each case in a new process."""
    figures = {}
    for case in cases:
        print(f"\nsearch: {CASES[case].__doc__}", flush=True)
        command = [sys.executable, "-m", "benchmarks.search", "--case", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[case] = json.loads(done.stdout.splitlines()[-1])
        print(f" {figures[case]}", flush=True)
    return {"machine": machine(), "versions": versions(), "figures": figures}


def write(result: dict[str, Any]) -> None:
    """Writes ``results/search.json`` and ``.md``, and keeps the cases measured before."""
    path = RESULTS / "search.json"
    if path.exists():
        before = json.loads(path.read_text())["figures"]
        result = {**result, "figures": {**before, **result["figures"]}}
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """Returns the tables of a result."""
    figures, machine = result["figures"], result["machine"]
    tables = [TABLES[case](figures[case]) for case in CASES if case in figures]
    head = (
        f"Vectors drawn around {_CENTRES:,} centres, 10 neighbours, "
        f"{processor(machine)}, `local[2]`. Times with Spark are from a warm session, and "
        "include everything from reading the Parquet files to the result."
    )
    return "\n\n".join([head, *tables])


def _libraries_table(figures: dict[str, list[float]]) -> str:
    names = {
        "product": "NumPy, matrix product only",
        "numpy": "imagevec on NumPy",
        "faiss": "faiss, `IndexFlatIP`",
    }
    return _table(
        "**4,096 x 50,000 x 1,280**, the ten nearest, one process with two threads:",
        ["library", "seconds", "by round"],
        [
            [name, f"{statistics.median(figures[run]):.2f}", _rounds(figures[run])]
            for run, name in names.items()
        ],
    )


def _exact_table(figures: dict[str, list[float]]) -> str:
    names = {
        "product": "NumPy, matrix product only, one process with two threads",
        "numpy": "imagevec on NumPy, the same process",
        "nearest": "`nearest`",
    }
    rows = []
    for run, name in names.items():
        pairs = zip(figures[run], figures["product"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        seconds = f"{statistics.median(figures[run]):.1f}"
        rows.append([name, seconds, _rounds(figures[run]), f"{ratio:.2f}"])
    return _table(
        "**50,000 x 50,000 x 1,280**, exact:",
        ["run", "seconds", "by round", "relative to the product"],
        rows,
    )


def _queries_table(figures: dict[str, Any]) -> str:
    return _table(
        "**1,000 queries**, exact, vectors of 512 floats, a JVM of 1 GB:",
        ["rows", "seconds", "peak RSS per worker", "peak live heap of the JVM"],
        [
            [
                f"{int(rows):,}",
                f"{row['seconds']:.0f}",
                f"{row['worker_rss_mb']:.0f} MB",
                f"{row['heap_mb']:.0f} MB",
            ]
            for rows, row in figures.items()
        ],
    )


def _join_table(figures: dict[str, Any]) -> str:
    return _table(
        "**Spark's `nearestByJoin`** on 2,000 x 2,000, and `nearest` on 50,000 x 50,000. The share "
        "of equal neighbours, up to ties, is measured on 2,000 x 2,000:",
        ["floats", "nearestByJoin, per pair", "nearest, per pair", "ratio", "same neighbours"],
        [
            [
                f"{int(features):,}",
                f"{row['nearestByJoin_ns_a_pair']:,.0f} ns",
                f"{row['nearest_ns_a_pair']:.1f} ns",
                f"{row['ratio']:.0f}",
                f"{row['same']:.4f}",
            ]
            for features, row in figures.items()
        ],
    )


def _same_table(figures: dict[str, float]) -> str:
    return _table(
        "**500 queries in 200,000 x 512**, the share of neighbours that agree with a reference:",
        ["reference", "share"],
        [[name.removeprefix("same as "), f"{share:.4f}"] for name, share in figures.items()],
    )


def _clustered_table(figures: dict[str, Any]) -> str:
    return _methods_table("**10,000 queries in 1,000,000 x 512**:", "recall", figures)


def _lsh_table(figures: dict[str, Any]) -> str:
    return _methods_table(
        "**Near-duplicates of 20,000 x 512**, 1,000 planted pairs, compared with MLlib's "
        "`BucketedRandomProjectionLSH`:",
        "pairs found",
        figures,
    )


def _methods_table(title: str, found: str, figures: dict[str, Any]) -> str:
    rows = [
        [method, f"{row['seconds']:.0f}", f"{row['recall']:.4f}"] for method, row in figures.items()
    ]
    return _table(title, ["method", "seconds", found], rows)


def _duplicates_table(figures: dict[str, Any]) -> str:
    return _table(
        "**Near-duplicates of 1,000,000 x 512**, clustered, 10,000 planted pairs, a JVM of 1 GB:",
        ["seconds", "pairs found", "comparisons", "peak RSS per worker", "peak live heap"],
        [
            [
                f"{figures['seconds']:.0f}",
                f"{figures['found']:.4f}",
                f"{figures['compared']:.4f} of all pairs",
                f"{figures['worker_rss_mb']:.0f} MB",
                f"{figures['heap_mb']:.0f} MB",
            ]
        ],
    )


def _similar_table(figures: dict[str, Any]) -> str:
    return _table(
        "**`imagevec similar`** on 200,000 x 1,280, whole process:",
        ["seconds", "by round", "peak RSS"],
        [
            [
                f"{statistics.median(figures['seconds']):.1f}",
                _rounds(figures["seconds"]),
                f"{figures['rss_mb']:.0f} MB",
            ]
        ],
    )


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _rounds(seconds: list[float]) -> str:
    return ", ".join(f"{figure:.1f}" for figure in seconds)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "libraries": _libraries_table,
    "exact": _exact_table,
    "queries": _queries_table,
    "spark_join": _join_table,
    "same_as_numpy": _same_table,
    "clustered": _clustered_table,
    "duplicates": _duplicates_table,
    "lsh": _lsh_table,
    "similar": _similar_table,
}


if __name__ == "__main__":
    main()
