"""``extract`` to tables of a catalog: Delta and Iceberg."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from imagevec import FingerprintError, ImageVecError, OptionError, extract, nearest, provenance
from imagevec.storage.folder import Folder
from imagevec.table.catalog import PROPERTY, CatalogTable
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.tables.conftest import Extract

ROWS = "id string, image binary, updated string"


def image(seed: int) -> bytes:
    return encode(photo(30, 20, seed=seed))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Creates four photos and a file that is not an image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(["a b.png", "it's.png", "c.png", "d.png"]):
        (folder / name).write_bytes(image(seed))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def rows(spark: SparkSession, name: str) -> dict[str, Row]:
    """Returns the rows of a table by path, which must be unique."""
    found = spark.read.table(name).collect()
    by_path = {row.path.rpartition("/")[2]: row for row in found}
    assert len(by_path) == len(found)
    return by_path


def names(spark: SparkSession, name: str) -> tuple[set[str], set[str]]:
    """Returns the names of the images with features, and of the bad ones."""
    return set(rows(spark, name)), set(rows(spark, f"{name}_errors"))


def version_of(spark: SparkSession, name: str) -> Any:
    """Returns a value that each commit changes."""
    if name.startswith("local."):
        return [row[0] for row in spark.sql(f"SELECT snapshot_id FROM {name}.snapshots").collect()]
    return spark.sql(f"DESCRIBE HISTORY {name}").count()


GOOD = {"a b.png", "it's.png", "c.png", "d.png"}


def test_second_run_computes_nothing(
    run: Extract, spark: SparkSession, photos: Path, name: str, staging: Path, provider: str
) -> None:
    report = run(photos)
    assert (report.found, report.features, report.dest) == (5, 4, name)
    assert report.errors == {"unsupported_format": 1}
    assert names(spark, name) == (GOOD, {"bad.png"})
    assert provider_of(spark, name) == provider_of(spark, f"{name}_errors") == provider

    before = version_of(spark, name), version_of(spark, f"{name}_errors")
    again = run(photos)
    assert (again.found, again.done_before, again.features, again.errors) == (5, 5, 0, {})
    assert (version_of(spark, name), version_of(spark, f"{name}_errors")) == before
    assert not list(staging.iterdir())


def provider_of(spark: SparkSession, name: str) -> str:
    described = spark.sql(f"DESCRIBE TABLE EXTENDED {name}").where("col_name = 'Provider'")
    return str(described.collect()[0].data_type)


def test_vectors_equal_those_in_a_folder(
    run: Extract, spark: SparkSession, photos: Path, name: str, tmp_path: Path
) -> None:
    run(photos)
    given: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
    extract(photos, tmp_path / "dest", spark=spark, **given)
    for suffix, folder in (("", tmp_path / "dest"), ("_errors", tmp_path / "dest" / "_errors")):
        there = spark.read.table(name + suffix).orderBy("path")
        assert there.columns == spark.read.parquet(str(folder)).columns
        assert there.collect() == spark.read.parquet(str(folder)).orderBy("path").collect()


def touch(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    os.utime(file, (2e9, 2e9))


def test_changed_new_and_bad_images(
    run: Extract, spark: SparkSession, photos: Path, name: str
) -> None:
    run(photos)
    before = rows(spark, name)
    touch(photos / "c.png", image(7))
    touch(photos / "d.png", b"no image any more")
    touch(photos / "bad.png", image(8))
    (photos / "new.png").write_bytes(image(9))
    report = run(photos)
    assert (report.done_before, report.features, report.errors) == (
        2,
        3,
        {"unsupported_format": 1},
    )
    assert names(spark, name) == ({*GOOD, "bad.png", "new.png"} - {"d.png"}, {"d.png"})
    after = rows(spark, name)
    assert after["a b.png"] == before["a b.png"]
    assert after["c.png"].features != before["c.png"].features


STEPS = {
    "before the first commit": ("_merge", 0, "before"),
    "after the first commit": ("_merge", 0, "after"),
    "between the commits": ("_merge", 1, "before"),
    "before the acknowledgement": ("_merge", 1, "after"),
}


class Stopped(BaseException):
    """What a test raises instead of SIGKILL."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Stops the run at a step of publishing. From then on, it can change no file either."""
    method_name, number, when = STEPS[step]
    method = getattr(CatalogTable, method_name)
    calls = 0

    def stop() -> None:
        for changing in ("move", "delete", "write", "create"):
            monkeypatch.setattr(Folder, changing, stopped)
        monkeypatch.setattr(CatalogTable, method_name, stopped)
        raise Stopped

    def stopped(*_: Any) -> None:
        raise Stopped

    def watched(self: CatalogTable, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        is_it = calls == number + 1
        if is_it and when == "before":
            stop()
        method(self, *arguments)
        if is_it:
            stop()

    monkeypatch.setattr(CatalogTable, method_name, watched)


@pytest.mark.parametrize("step", STEPS)
def test_each_key_is_there_once_after_a_stop(
    run: Extract,
    spark: SparkSession,
    photos: Path,
    name: str,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(photos)
    touch(photos / "c.png", image(7))
    touch(photos / "d.png", b"no image any more")
    touch(photos / "bad.png", image(8))
    (photos / "new.png").write_bytes(image(9))
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            run(photos)
    report = run(photos)
    assert (report.done_before, report.features) == (6, 0)  # the parts of the first run were merged
    assert names(spark, name) == ({*GOOD, "bad.png", "new.png"} - {"d.png"}, {"d.png"})
    assert run(photos).done_before == 6
