"""The environment that every test runs in; it is set before PyTorch or Spark is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.shared import ROOT

pytest_plugins = ["tests.helpers.spark", "tests.helpers.clip"]

_cache = tempfile.mkdtemp(prefix="imagevec-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

os.environ["XDG_CACHE_HOME"] = _cache  # never the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"  # never the network
for name in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
    os.environ.pop(name, None)

# Spark's workers and the tests' own subprocesses see the code that the tests see.
os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
os.environ["SPARK_CONF_DIR"] = str(ROOT / "tests" / "conf")
os.environ["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take a session need Java."""
    for item in items:
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker("java")


_common: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, database=None, **_common)
settings.register_profile("dev", max_examples=500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
