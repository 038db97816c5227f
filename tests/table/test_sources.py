"""What a source hands to Spark: keys, versions, and rows in partitions that make good tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from imagevec import OptionError
from imagevec.storage.folder import Folder
from imagevec.table import sources
from imagevec.table.sources import (
    IMAGE,
    SOURCE_ERROR,
    FileSource,
    Source,
    Survey,
    TableSource,
    check_keys,
    found_in_keys,
)

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("size", "cores", "tasks"),
    [
        (0, 4, 1),
        (MEGABYTE, 4, 1),
        (100 * MEGABYTE, 4, 12),  # some for each core, so that they end at the same time
        (100 * MEGABYTE, 64, 50),  # but none smaller than 2 MB
        (10_000 * MEGABYTE, 4, 157),  # and none larger than 64 MB
        (10**15, 4, 14_901_162),
    ],
)
def test_how_many_tasks(size: int, cores: int, tasks: int) -> None:
    assert sources._number_of_tasks(size, cores) == tasks


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files {x}"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.png").write_bytes(bytes(number))
    (folder / "_hidden.png").touch()
    return folder


def survey_of(source: Source) -> Survey:
    """Where all is to do."""
    found = source.keys().agg(*found_in_keys()).collect()[0].asDict()
    check_keys(found)
    return Survey(found["found"], found["partitions"], pending=found["found"])


def parts(rows: DataFrame) -> list[set[str]]:
    return [{row.path for row in part} for part in rows.rdd.glom().collect()]


def test_files(
    spark: SparkSession, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_TASK_BYTES", 10 * sources._LEAST_BYTES)
    monkeypatch.setattr(sources, "_LISTING_ROWS", 7)
    source = FileSource(spark, str(files), recursive=False, pattern=None, timeout_seconds=1)
    source.prepare(Folder(tmp_path / "listing {y}"))
    survey = survey_of(source)
    assert survey.found == 60
    assert source.skipped == {"hidden": 1}
    rows = source.rows(survey, None)
    by_part = parts(rows)
    assert len(by_part) == 6
    # The same files, whenever a task is computed again.
    assert parts(source.rows(survey, None)) == by_part
    found = {row.path: row for row in rows.collect()}
    path = files / "59.png"
    row = found[f"file:{path}"]
    assert len(found) == 60
    assert (row.length, row[IMAGE], row[SOURCE_ERROR]) == (59, f"file:{path}", None)
    assert row.version == f"59:{path.stat().st_mtime_ns // 1000}"
    assert {row.path: row.version for row in source.keys().collect()} == {
        path: row.version for path, row in found.items()
    }
    assert source.mended(source.keys()) == []


@pytest.mark.parametrize("most", [0, 100])
def test_only_what_is_to_be_done(
    spark: SparkSession, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Whether few keys go to the rows, or rows and keys to one another."""
    monkeypatch.setattr(sources, "_MAX_BROADCAST_KEYS", most)
    source = FileSource(spark, str(files), recursive=False, pattern="[1-3].png", timeout_seconds=1)
    source.prepare(Folder(tmp_path / "listing"))
    assert survey_of(source).found == 3
    keys = [f"file:{files}/1.png", f"file:{files}/3.png", "file:/gone.png"]
    pending = spark.createDataFrame(
        [(key, False) for key in keys], "path string, is_changed boolean"
    )
    rows = source.rows(Survey(found=3, partitions=1, pending=2), pending)
    assert set().union(*parts(rows)) == set(keys[:2])


def table(df: DataFrame, **options: Any) -> TableSource:
    given = {"column": "content", "key": "id", "version": None, "keep": (), **options}
    return TableSource(df, **given)


def test_many_small_rows_of_a_few_partitions(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are spread by their keys; others stay where they are, and are not moved."""
    monkeypatch.setattr(sources, "_TASK_ROWS", 10)
    df = spark.range(0, 100, 1, 2).selectExpr("id", "CAST('x' AS binary) AS content")
    source = table(df)
    survey = survey_of(source)
    assert survey == Survey(found=100, partitions=2, pending=100)
    assert len(parts(source.rows(survey, None))) == 10
    monkeypatch.setattr(sources, "_TASK_ROWS", 100)
    assert len(parts(source.rows(survey, None))) == 2
    one = spark.createDataFrame([("5", False)], "path string, is_changed boolean")
    assert set().union(*parts(source.rows(Survey(100, 2, pending=1), one))) == {"5"}


STRUCT = "struct<bytes: binary, path: string>"


@pytest.mark.parametrize(
    ("schema", "row", "options", "path", "length"),
    [
        ("id int, content binary", (1, b"xy"), {}, "1", 2),
        ("id int, content binary", (1, None), {}, "1", None),
        ("path string, content binary", ("p", b"xy"), {"key": None}, "p", 2),
        ("PATH string, content binary", ("p", b"xy"), {"key": None}, "p", 2),
        ("content string", ("/a.png",), {"key": None}, "/a.png", None),
        ("id int, content string", (1, "/a.png"), {}, "1", None),
        (f"content {STRUCT}", ((b"xyz", "p"),), {"key": None}, "p", 3),
        (f"content {STRUCT}", ((None, "p"),), {"key": None}, "p", None),
        ("`a.b` int, `c.d` binary", (1, b"xy"), {"key": "a.b", "column": "c.d"}, "1", 2),
    ],
)
def test_keys_and_lengths(
    spark: SparkSession,
    schema: str,
    row: tuple[Any, ...],
    options: dict[str, Any],
    path: str,
    length: int | None,
) -> None:
    source = table(spark.createDataFrame([row], schema), **options)
    survey = survey_of(source)
    assert survey.found == 1
    (found,) = source.rows(survey, None).collect()
    assert (found.path, found.length) == (path, length)


def test_versions(spark: SparkSession) -> None:
    def versions(df: DataFrame, **options: Any) -> list[str | None]:
        return [row.version for row in table(df, **options).keys().orderBy("path").collect()]

    data = [(1, b"one", 1), (2, b"two", 1), (3, b"one", None), (4, None, 2)]
    df = spark.createDataFrame(data, "id int, content binary, edition int")
    first, second, third, null = versions(df)
    assert first == third and first != second and null not in (first, second)
    assert all(version and len(version) <= 16 for version in (first, second, null))
    assert versions(df, version="edition") == ["1", "1", None, "2"]
    paths = spark.createDataFrame([(1, "/a.png"), (2, "/b.png")], "id int, content string")
    assert versions(paths) == [None, None]
    both = spark.createDataFrame([(1, b"a", "p"), (2, b"a", "q")], "id int, b binary, p string")
    structs = both.selectExpr("id", "named_struct('bytes', b, 'path', p) AS content")
    assert len(set(versions(structs))) == 2


def test_keys_must_be_unique_and_there(spark: SparkSession) -> None:
    schema = "id string, content binary"
    twice = spark.createDataFrame([("a", b""), ("b", b""), ("a", b"x")], schema)
    with pytest.raises(OptionError, match="the key 'a' occurs 2 times"):
        survey_of(table(twice))
    nulls = spark.createDataFrame([(None, b"")] * 2 + [("b", b"")], schema)
    with pytest.raises(OptionError, match="2 of 3 rows have no key"):
        survey_of(table(nulls))
    assert survey_of(table(twice.limit(0))).found == 0
