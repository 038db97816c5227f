"""The Spark session of the examples."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession


def start_spark(name: str) -> SparkSession:
    """Starts a local session that runs this Python and only logs errors."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    quiet = Path(__file__).with_name("log4j2.properties").as_uri()
    builder = SparkSession.builder.master("local[2]").appName(name)
    builder.config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={quiet}")
    builder.config("spark.ui.enabled", False)
    builder.config("spark.ui.showConsoleProgress", False)
    return builder.getOrCreate()
