"""Weights files from the driver to the executors, once each, by Spark's own file distribution."""

from __future__ import annotations

from pathlib import Path

from pyspark import SparkContext, SparkFiles
from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError


def active_session() -> SparkSession:
    """The session that this thread uses.

    Raises:
        ImageVecError: There is none.
    """
    session = SparkSession.getActiveSession()
    if session is None and SparkContext._active_spark_context is not None:
        session = SparkSession.builder.getOrCreate()  # made, but by another thread
    if session is None:
        raise ImageVecError(
            "there is no active SparkSession: call SparkSession.builder.getOrCreate() first"
        )
    return session


def ship(session: SparkSession, path: Path) -> None:
    """Makes a file available to every executor, under its own name, which must tell its content."""
    if hasattr(session, "_jsc"):  # not under Spark Connect
        session.sparkContext.addFile(str(path))
    else:
        session.addArtifacts(str(path), file=True)


def shipped(name: str) -> Path:
    """On a worker: the path of a file that was shipped."""
    return Path(SparkFiles.get(name))
