"""Sends a plan's files from the driver to the executors, once each, through Spark."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pyspark import SparkFiles
from pyspark.sql import SparkSession

from imagevec import cache
from imagevec.plan import Plan
from imagevec.spark.sessions import is_connect

_lock = threading.Lock()
_shipped: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # names, by what keeps them


def ship(session: SparkSession, plan: Plan) -> None:
    """Makes a plan's files available to every executor, under their names."""
    for name in plan.files:
        ship_file(session, cache.stored(name))


def ship_file(session: SparkSession, path: Path) -> None:
    """Makes a file available to every executor, under its name, which depends on its content.

    It is sent once: Spark warns about files that are added again, and Connect sends their bytes.
    """
    keeper = session if is_connect(session) else session.sparkContext
    with _lock:
        sent = _shipped.setdefault(keeper, set())
        if path.name in sent:
            return
        if is_connect(session):
            session.addArtifacts(str(path), file=True)
        else:
            session.sparkContext.addFile(str(path))
        sent.add(path.name)


def shipped(name: str) -> Path:
    """Returns the path of a shipped file, on a worker."""
    path = Path(SparkFiles.get(name))
    if path.exists():
        return path
    # A stream under Connect runs in a clone of the session. Its files are in the clone's folder,
    # but its workers get the folder above.
    return next(path.parent.glob(f"*/{name}"), path)
