"""Files of a plan from the driver to the executors, once each, by Spark's own distribution."""

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
    """Makes a file available to every executor, under its name, which is of its content."""
    if is_connect(session):
        session.addArtifacts(str(path), file=True)
    else:
        session.sparkContext.addFile(str(path))


def shipped(name: str) -> Path:
    """On a worker: the path of a file that was shipped."""
    return Path(SparkFiles.get(name))
