from __future__ import annotations

import shutil
from collections.abc import Iterator

import pandas as pd
import pyspark
import pytest
from pyspark.sql.pandas.functions import pandas_udf

from imagevec import OptionError, recommended_conf
from imagevec.spark.conf import ARROW_BYTES, DAEMON
from tests.helpers.pipeline import run_python
from tests.helpers.shared import ROOT


def test_an_arrow_batch_is_bounded_in_bytes():
    for image_bytes in (100, 10_000, 100_000, 10_000_000, 10**9):
        records = int(
            recommended_conf(image_bytes=image_bytes)[
                "spark.sql.execution.arrow.maxRecordsPerBatch"
            ]
        )
        assert 1 <= records <= 10_000
        assert records == 1 or records * image_bytes <= 32 << 20


@pytest.mark.skipif(pyspark.__version__ < "4", reason="Spark 3.5 counts rows alone")
def test_spark_ends_an_arrow_batch_at_its_bytes(spark):
    @pandas_udf("long")  # type: ignore[call-overload]
    def rows_of_batch(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for batch in batches:
            yield pd.Series([len(batch)] * len(batch))

    megabytes = spark.range(64, numPartitions=1).selectExpr("repeat('x', 1048576) AS content")
    before = spark.conf.get(ARROW_BYTES)
    spark.conf.set(ARROW_BYTES, recommended_conf()[ARROW_BYTES])
    try:
        sizes = {
            row.rows for row in megabytes.select(rows_of_batch("content").alias("rows")).collect()
        }
    finally:
        spark.conf.set(ARROW_BYTES, before)
    assert max(sizes) <= 17


def test_workers_are_reused():
    assert recommended_conf()["spark.python.worker.reuse"] == "true"


def test_there_is_no_daemon_in_an_archive(tmp_path):
    """Workers unpack an archive of --py-files later than the daemon starts."""
    assert recommended_conf()[DAEMON] == "imagevec.spark.daemon"
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", ROOT, "imagevec")
    printed = run_python(f"""
import sys
sys.path.insert(0, {archive!r})
import imagevec
print(imagevec.__file__, imagevec.recommended_conf())
""")
    assert printed.startswith(archive)
    assert DAEMON not in printed


def test_a_gpu_serves_one_task():
    conf = recommended_conf(executor_cores=8, executor_gpus=2)
    assert conf["spark.executor.resource.gpu.amount"] == "2"
    assert conf["spark.task.resource.gpu.amount"] == "1"
    assert conf["spark.task.cpus"] == "4"
    assert "spark.task.resource.gpu.amount" not in recommended_conf()


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_bytes": 0},
        {"executor_cores": -1},
        {"executor_gpus": -1},
        {"executor_cores": 3, "executor_gpus": 2},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        recommended_conf(**wrong)


def test_memory_follows_the_engine(monkeypatch):
    name = "spark.executor.memoryOverhead"
    assert recommended_conf(executor_cores=8, executor_gpus=2)[name] == f"{2 * 1536}m"
    monkeypatch.setattr("imagevec.engines.openvino.is_available", lambda: True)
    assert recommended_conf(executor_cores=4)[name] == f"{4 * 768}m"
    monkeypatch.setattr("imagevec.engines.openvino.is_available", lambda: False)
    assert recommended_conf(executor_cores=4)[name] == f"{4 * 1536}m"
