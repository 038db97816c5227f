"""Sends a plan's files from the driver to the executors, once each, through Spark."""

from __future__ import annotations

from pathlib import Path

from pyspark import SparkFiles
from pyspark.sql import SparkSession

from imagevec import cache
from imagevec.plan import Plan
from imagevec.spark.sessions import is_connect


def ship(session: SparkSession, plan: Plan) -> None:
    """Makes a plan's files available to every executor, under their names."""
    for name in plan.files:
        ship_file(session, cache.stored(name))


def ship_file(session: SparkSession, path: Path) -> None:
    """Makes a file available to every executor, under its name, which depends on its content."""
    if is_connect(session):
        session.addArtifacts(str(path), file=True)
    else:
        session.sparkContext.addFile(str(path))


def shipped(name: str) -> Path:
    """Returns the path of a shipped file, on a worker."""
    return Path(SparkFiles.get(name))
