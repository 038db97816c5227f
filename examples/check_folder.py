"""Checks the files of a folder: counts rows, features, errors by code and worker deaths.

    python examples/check_folder.py FOLDER [MODEL] [WEIGHTS]

Every file under the folder passes through a query on ``local[2]`` twice, in different orders. Exits
with 1 if the results differ, or if a row or a worker is lost.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from pyspark.sql import SparkSession
from pyspark.sql.functions import rand

from imagevec import features_udf


def main(folder: str, model: str = "squeezenet1_1", weights: str = "random") -> int:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = (
        SparkSession.builder.master(
            "local[2,4]"
        )  # Spark tries a task whose worker dies up to 4 times
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "64")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    files_in = sum(is_read(path, folder) for path in Path(folder).rglob("*"))
    files = spark.read.format("binaryFile").option("recursiveFileLookup", True).load(folder)
    features = features_udf("content", model=model, weights=weights, output="struct")
    spark.sparkContext.setJobGroup("check", "check_folder")
    first, second = (
        sorted(shuffled.select("path", features.alias("result")).collect())
        for shuffled in (files.repartition(4), files.orderBy(rand(seed=1)))
    )
    deaths = failed_tasks(spark)
    spark.stop()

    codes = Counter(row.result.error.partition(":")[0] for row in first if row.result.error)
    print(f"files in                {files_in}")
    print(f"rows out                {len(first)}")
    print(f"features                {sum(row.result.features is not None for row in first)}")
    print(f"errors                  {codes.total()}")
    for code, count in codes.most_common():
        print(f"  {code:<22}{count}")
    print(f"worker deaths           {deaths}")
    print(f"same in another order   {first == second}")
    return int(not (len(first) == files_in and deaths == 0 and first == second))


def is_read(path: Path, folder: str) -> bool:
    """Returns whether Spark reads a path: a file without a hidden part."""
    parts = path.relative_to(folder).parts
    return path.is_file() and not any(part.startswith((".", "_")) for part in parts)


def failed_tasks(spark: SparkSession) -> int:
    """Counts failed tasks. A worker that dies fails its task; a bad image does not."""
    tracker = spark.sparkContext.statusTracker()
    jobs = [tracker.getJobInfo(number) for number in tracker.getJobIdsForGroup("check")]
    stages = {stage for job in jobs if job for stage in job.stageIds}
    infos = [tracker.getStageInfo(stage) for stage in stages]
    return sum(info.numFailedTasks for info in infos if info)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
