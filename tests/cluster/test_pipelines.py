"""A declarative pipeline: the project in docs/pipelines.md, which `spark-pipelines run` updates."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pyspark
import pytest
from pyspark.sql import SparkSession

from imagevec import features_udf, provenance
from tests.helpers.clusters import session_of
from tests.helpers.images import encode, photo
from tests.helpers.shared import ROOT

RUN_SECONDS = 300
VERSION = tuple(int(part) for part in pyspark.__version__.split(".")[:2])
SETTINGS = {
    "spark.connect.grpc.binding.address": "127.0.0.1",
    "spark.sql.catalogImplementation": "hive",  # its metastore is in the current folder
    "spark.ui.enabled": "false",
}

pytestmark = pytest.mark.skipif(VERSION < (4, 1), reason="PySpark 4.1 has the first pipelines")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The documented project, on the folder ``photos`` beside it and with random weights."""
    pytest.importorskip("yaml", reason="pyspark[pipelines] is not installed")
    (tmp_path / "photos").mkdir()
    folder = tmp_path / "project"
    (folder / "transformations").mkdir(parents=True)
    (folder / "spark-pipeline.yml").write_text(documented("yaml", tmp_path))
    (folder / "transformations" / "photos.py").write_text(documented("py", tmp_path))
    return folder


def documented(language: str, data: Path) -> str:
    """The block of code in the section, with its folder ``/data`` and its weights replaced."""
    page = (ROOT / "docs" / "pipelines.md").read_text()
    section = page.partition("\n## Declarative pipelines\n")[2].partition("\n## ")[0]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    weights = 'model="resnet18", weights="random"'
    return code.replace("/data/", f"{data}/").replace('model="resnet18"', weights)


def run(project: Path) -> subprocess.CompletedProcess[str]:
    """Updates the pipeline once, in a process of its own."""
    program = str(Path(pyspark.__file__).parent / "bin" / "spark-pipelines")
    conf = [part for name, value in SETTINGS.items() for part in ("--conf", f"{name}={value}")]
    return subprocess.run(
        [program, *conf, "run"],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "SPARK_HOME": str(Path(pyspark.__file__).parent),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_TESTING": "1",  # Connect takes a free port
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
    )


def vectors(spark: SparkSession, images: dict[str, bytes]) -> dict[str, list[float] | None]:
    """Computes features in an ordinary session."""
    rows = spark.createDataFrame(list(images.items()), "name string, content binary")
    features = features_udf("content", model="resnet18", weights="random")
    return {row.name: row.features for row in rows.select("name", features).collect()}


def assert_table(table: Path, spark: SparkSession, images: dict[str, bytes]) -> None:
    """Asserts that a table has one row for each file, with its features and their provenance."""
    stored = spark.read.parquet(str(table))
    rows = stored.collect()
    features = {Path(row.path).name: row.features for row in rows}
    assert len(rows) == len(images)
    expected = vectors(spark, images)
    assert set(features) == set(expected)
    for name, vector in expected.items():
        assert features[name] == (vector and pytest.approx(vector, rel=1e-4, abs=1e-6)), name
    assert provenance(stored, "features").model == "resnet18"


def update(project: Path, files: dict[str, bytes]) -> None:
    """Adds or replaces photos, and updates the pipeline."""
    for name, content in files.items():
        (project.parent / "photos" / name).write_bytes(content)
    done = run(project)
    assert done.returncode == 0, done.stdout


def test_materialized_view_and_streaming_table(project: Path) -> None:
    first = {f"{seed}.png": encode(photo(seed=seed)) for seed in range(2)}
    first["broken.jpg"] = b"no image"
    second = {"0.png": encode(photo(seed=10)), "2.png": encode(photo(seed=2))}
    update(project, first)
    update(project, second)

    # The view has recomputed the changed photo; the stream has computed only the new one.
    tables = project / "spark-warehouse"
    with session_of("local[1]") as spark:
        assert_table(tables / "current_features", spark, first | second)
        assert_table(tables / "arriving_features", spark, second | first)


def test_register_is_blocked(project: Path) -> None:
    (project / "transformations" / "photos.py").write_text(
        "from pyspark.sql import SparkSession\n"
        "from imagevec import register\n"
        'register(SparkSession.active(), model="resnet18", weights="random")\n'
    )
    done = run(project)
    assert done.returncode != 0
    assert "SESSION_MUTATION_IN_DECLARATIVE_PIPELINE.REGISTER_UDF" in done.stdout
