"""A session with Delta and Iceberg, from Maven Central: classic, or Spark Connect.

``scripts/test-tables.sh`` sets ``IMAGEVEC_SESSION`` to ``classic`` or ``connect``, because one
process cannot have both.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from imagevec import ExtractReport, extract
from tests.helpers.factories import tiny

IS_CONNECT = os.environ.get("IMAGEVEC_SESSION") == "connect"
PACKAGES = (
    "io.delta:delta-spark_4.1_2.13:4.4.0",
    "org.apache.iceberg:iceberg-spark-runtime-4.1_2.13:1.12.0",
)
EXTENSIONS = (
    "io.delta.sql.DeltaSparkSessionExtension",
    "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions",
)
SETTINGS = {
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.memory": "2g",
    "spark.connect.grpc.binding.address": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.python.daemon.module": "imagevec.spark.daemon",
    "spark.jars.packages": ",".join(PACKAGES),
    "spark.sql.extensions": ",".join(EXTENSIONS),
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.sources.default": "delta",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.catalog.local": "org.apache.iceberg.spark.SparkCatalog",
    "spark.sql.catalog.local.type": "hadoop",
}

Extract = Callable[..., ExtractReport]


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    builder = SparkSession.builder
    if IS_CONNECT:
        os.environ["SPARK_TESTING"] = "1"  # its server then has a free port
        builder = builder.remote("local[4]")
    else:
        builder = builder.master("local[4]")
    warehouse = tmp_path_factory.mktemp("warehouse")
    folders = {
        "spark.sql.warehouse.dir": str(warehouse / "delta"),
        "spark.sql.catalog.local.warehouse": str(warehouse / "iceberg"),
    }
    for name, value in {**SETTINGS, **folders}.items():
        builder = builder.config(name, value)
    with warnings.catch_warnings():
        # The server starts with these settings, and then warns that the client cannot set them.
        warnings.simplefilter("ignore")
        session = builder.getOrCreate()
    session.sql("CREATE NAMESPACE local.db")
    yield session
    session.stop()


@pytest.fixture(params=["delta", "iceberg"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name(provider: str) -> str:
    """Returns a new name of a table."""
    namespace = {"delta": "spark_catalog.default", "iceberg": "local.db"}[provider]
    return f"{namespace}.t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return tmp_path / "staging"


@pytest.fixture
def run(spark: SparkSession, name: str, staging: Path) -> Extract:
    """Extracts features of a source into the table ``name``."""

    def extract_to_table(src: Any, **options: Any) -> ExtractReport:
        given = {"model": tiny, "weights": "random", "engine": "torch", **options}
        return extract(src, name, to="table", staging=staging, spark=spark, **given)

    return extract_to_table
