"""An image that kills the process that decodes it, every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pyspark.sql import SparkSession

from imagevec import features_udf
from tests.cluster.poison_daemon import POISON
from tests.helpers.clusters import session_of
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import vector_of

IMAGES = [POISON if number == 3 else encode(photo(seed=number)) for number in range(8)]


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    """Two workers, two attempts a task."""
    daemon = {"spark__python__daemon__module": "tests.cluster.poison_daemon"}
    with session_of("local[2,2]", **daemon) as session:
        yield session


def results(spark: SparkSession, **options: Any) -> list:
    images = spark.sparkContext.parallelize(list(enumerate(IMAGES)), 2)
    frame = spark.createDataFrame(images, "id int, content binary")
    column = features_udf(
        "content", model=tiny, weights="random", engine="torch", output="struct", **options
    )
    rows = frame.select("id", column.alias("result")).collect()
    return [row.result for row in sorted(rows)]


def test_it_fails_the_job_that_decodes_in_the_worker(spark: SparkSession) -> None:
    with pytest.raises(Exception, match="crashed"):
        results(spark)


def test_it_costs_one_row_with_isolate(spark: SparkSession) -> None:
    for number, result in enumerate(results(spark, isolate=True)):
        if number == 3:
            assert result.features is None
            assert result.error.startswith("crashed:")
        else:
            expected = vector_of(IMAGES[number], model=tiny, weights="random")
            assert result.features == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert result.error is None
