"""Runs the programs of examples/ in the tests' own Spark session."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark.sql import SparkSession

from tests.helpers.shared import ROOT


def run_example(
    monkeypatch: pytest.MonkeyPatch, spark: SparkSession, name: str, *arguments: str
) -> None:
    """Runs ``examples/<name>.py`` as a program that gets a new session of the same context."""
    file = str(ROOT / "examples" / f"{name}.py")
    session: Any = SimpleNamespace(start_spark=lambda app: spark.newSession())
    monkeypatch.setitem(sys.modules, "session", session)
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as done:
        assert not done.code
