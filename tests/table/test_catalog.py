"""Tables of a catalog, as far as Spark goes without Delta or Iceberg: see ``tests/tables``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from imagevec import ImageVecError, OptionError, extract
from imagevec.storage.folder import Folder
from imagevec.table import catalog
from imagevec.table.catalog import CatalogTable, _as_stored, _changes, _merge_clauses, _paths
from tests.helpers.factories import tiny

MODEL: dict[str, Any] = {"model": tiny, "weights": "random"}


@pytest.fixture
def staging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("catalog") / "staging"


def refused(spark: SparkSession, src: Path, name: str, staging: Path, **given: Any) -> str:
    with pytest.raises(OptionError) as raised:
        extract(src, name, to="table", staging=staging, spark=spark, **{**MODEL, **given})
    return str(raised.value)


def test_table_without_merge_is_refused_before_the_model(
    spark: SparkSession, folder: Path, staging: Path
) -> None:
    spark.sql("CREATE TABLE plain (path string) USING parquet")
    try:
        said = refused(spark, folder, "plain", staging, model="resnet5000")
        assert said == "plain is a table of parquet, which has no MERGE"
    finally:
        spark.sql("DROP TABLE plain")
    assert not staging.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_new_table_without_merge_is_refused(
    spark: SparkSession, folder: Path, staging: Path, overwrite: bool
) -> None:
    said = refused(spark, folder, "default.new", staging, overwrite=overwrite)
    assert "new would be a table of parquet, which has no MERGE" in said
    assert "spark.sql.sources.default" in said
    assert not spark.catalog.tableExists("default.new")


@pytest.mark.parametrize("name", ["", "a..b", "photos/features", "s3://bucket/x", "`a", "a b"])
def test_malformed_names_are_refused(
    spark: SparkSession, folder: Path, staging: Path, name: str
) -> None:
    assert "is not the name of a table" in refused(spark, folder, name, staging)


def test_staging_is_for_tables_only(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    for given, said in (
        ({"to": "table"}, "requires staging"),
        ({"staging": tmp_path}, "staging is only for to='table'"),
        ({"to": "delta"}, "choose 'folder' or 'table'"),
    ):
        with pytest.raises(OptionError, match=said):
            extract(folder, "t", spark=spark, **given)


def test_staging_is_outside_of_the_source(spark: SparkSession, folder: Path) -> None:
    assert "is inside SRC" in refused(spark, folder, "t", folder / "staging", recursive=True)


def test_each_table_has_its_own_folder_in_staging(spark: SparkSession, staging: Path) -> None:
    def work(name: str) -> str:
        return CatalogTable(spark, name, Folder(staging)).work.path

    names = ["t", "spark_catalog.default.t", "default.t", "`spark_catalog`.`default`.`t`"]
    (shared,) = {work(name) for name in names}
    assert Path(shared).parent == staging
    others = ["a.b.t", "default.`t.`", "`spark_catalog.default`.t", "t_", "`t-`", "`t/`", "T"]
    assert len({shared, *map(work, others)}) == 1 + len(others)


def test_conflicts_are_retried(
    spark: SparkSession, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    table = CatalogTable(spark, "t", Folder(staging))
    tries = 0

    def conflicting(text: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RuntimeError(text)

    for text in (
        "io.delta.exceptions.ConcurrentAppendException: [DELTA_CONCURRENT_APPEND.WITHOUT_HINT]",
        "(io.delta.exceptions.MetadataChangedException) The metadata of the table has changed",
        "(org.apache.iceberg.exceptions.ValidationException) Found conflicting files",
        "[TABLE_OR_VIEW_ALREADY_EXISTS] Cannot create table",
    ):
        tries = 0
        table._retried(partial(conflicting, text))
        assert tries == 3
    tries = 0
    with pytest.raises(RuntimeError, match="disk is full"):
        table._retried(lambda: conflicting("disk is full"))
    assert tries == 1
    tries = 0
    monkeypatch.setattr(catalog, "_RETRY_SECONDS", 0.0)
    with pytest.raises(ImageVecError, match="other writers have changed t"):
        table._retried(lambda: conflicting("org.apache.iceberg.exceptions.CommitFailedException"))


IMAGE_ROWS = "path string, version string, error string"
BOX_ROWS = f"{IMAGE_ROWS}, box string, box_number int, box_count int"


def changes(
    spark: SparkSession, schema: str, target: list[Any], wave: list[Any], others: list[Any]
) -> tuple[int, set[tuple[Any, ...]]]:
    def rows(of: list[Any]) -> DataFrame:
        return spark.createDataFrame(of, schema)

    count, stale = _changes(rows(target), rows(wave), _paths(rows(wave), rows(others)))
    return count, {tuple(row) for row in stale}


def test_changes_of_images(spark: SparkSession) -> None:
    same, no_version = ("same", "1", None), ("null", None, "e")
    target = [same, no_version, ("changed", "1", None), ("again", "1", "e"), ("moved", "1", "e")]
    target.append(("elsewhere", "1", None))
    wave = [same, no_version, ("changed", "2", None), ("again", "1", "f"), ("new", "1", None)]
    found = changes(spark, IMAGE_ROWS, target, wave, [("moved", "1", None)])
    assert found == (4, {("moved",)})
    assert changes(spark, IMAGE_ROWS, wave, wave, []) == (0, set())
    assert changes(spark, IMAGE_ROWS, [], [], [same]) == (0, set())


def test_changes_of_boxes(spark: SparkSession) -> None:
    def box(path: str, version: str, number: int | None) -> tuple[Any, ...]:
        return path, version, None, None, number, 3

    target = [box("a", "1", 0), box("a", "1", 1), box("b", "1", None), box("c", "1", 0)]
    target.append(box("elsewhere", "1", 0))
    wave = [box("a", "2", 0), box("b", "1", None)]
    found = changes(spark, BOX_ROWS, target, wave, [box("a", "2", 2), box("c", "2", None)])
    assert found == (3, {("a", 1), ("c", 0)})
    assert changes(spark, BOX_ROWS, target, target, []) == (0, set())


def test_names_in_a_merge_are_quoted() -> None:
    clauses = _merge_clauses(["path", "version", "error", "a`b c"])
    assert "t.`a``b c` = s.`a``b c`" in clauses
    assert "ON t.path <=> s.path WHEN" in clauses


def test_types_that_a_table_widens(spark: SparkSession) -> None:
    def schema(text: str) -> StructType:
        return spark.createDataFrame([], text).schema

    short = "a smallint, b array<tinyint>, c struct<d: smallint, e: map<string, tinyint>>"
    wide = "a int, b array<int>, c struct<d: int, e: map<string, int>>"
    assert _as_stored(schema(short), schema(wide)).simpleString() == schema(wide).simpleString()
    for there in (short, "a bigint, b string, c string", "z int"):
        stored = _as_stored(schema(short), schema(there))
        assert stored.simpleString() == schema(short).simpleString()
