"""A stream under Spark Connect runs in a session that the server clones."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from imagevec import features_udf
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved, vector_of

BINARY_FILE = "path string, modificationTime timestamp, length long, content binary"


def test_a_stream_finds_the_weights(spark: SparkSession, tmp_path: Path) -> None:
    source, sink = tmp_path / "source", tmp_path / "sink"
    source.mkdir()
    image = encode(photo(seed=50))
    (source / "a.png").write_bytes(image)
    weights = str(tmp_path / "tiny.pth")
    saved(tiny, tmp_path / "tiny.pth", seed=50)
    files = spark.readStream.format("binaryFile").schema(BINARY_FILE).load(str(source))
    query = (
        files.select("path", features_udf("content", model=tiny, weights=weights))
        .writeStream.format("parquet")
        .option("checkpointLocation", str(tmp_path / "checkpoint"))
        .trigger(availableNow=True)
        .start(str(sink))
    )
    query.awaitTermination()
    (row,) = spark.read.parquet(str(sink)).collect()
    expected = vector_of(image, model=tiny, weights=weights, engine="auto")
    assert row.features == pytest.approx(expected, rel=1e-4, abs=1e-6)
