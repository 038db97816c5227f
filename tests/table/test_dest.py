"""The table of features as files: what is put in, taken out, cut off and found again."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from imagevec import FingerprintError, ImageVecError, ImageVectorizer, OptionError
from imagevec.table.dest import KIND, Dest, check_outside
from tests.helpers.factories import tiny
from tests.helpers.stops import CUT_OFF, POINTS, fail_at, stop_at
from tests.helpers.tables import write_table

RUN = "0a1b2c"


@pytest.mark.parametrize(
    ("dest", "src", "is_inside"),
    [
        ("photos", "photos", True),
        ("photos/", "photos", True),
        ("photos/sub/table", "photos/", True),
        ("photos/../photos/x", "photos", True),
        ("file:{here}/photos/x", "photos", True),
        ("link/x", "photos", True),
        ("photos2", "photos", False),
        ("photos", "photos/sub", False),
        ("photos/table", "photos/*", True),
        ("photos/sub/table", "photos/*", True),
        ("photos/table", "photos/*.png", False),
        ("photos", "photos/*", False),
        ("photos/table", "photos/{sub,table}", True),
        ("s3://bucket/a/b", "s3a://bucket/a", True),
        ("s3://bucket/a/b", "s3://bucket/*", True),
        ("s3://bucket/ab", "s3://bucket/a/", False),
        ("s3://bucket/a", "gs://bucket/a", False),
    ],
)
def test_a_table_in_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dest: str, src: str, is_inside: bool
) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    dest = dest.format(here=tmp_path)
    if is_inside:
        with pytest.raises(OptionError, match="DEST is inside SRC"):
            check_outside(dest, src)
    else:
        check_outside(dest, src)


@pytest.fixture
def table(spark: SparkSession, tmp_path: Path) -> Dest:
    """Its place has a name that Hadoop and URIs could take for something else."""
    return Dest(spark, str(tmp_path / "a {b} [c]* %20 #?"))


def put(table: Dest, run: str, features: dict[str, str], errors: dict[str, str]) -> None:
    """Paths and their versions, as a job commits them."""
    rows: list[Any] = [(*row, None, "features") for row in features.items()]
    rows += [(*row, "empty: 0 bytes", "errors") for row in errors.items()]
    schema = f"path string, version string, error string, {KIND} string"
    table.write(table._spark.createDataFrame(rows, schema).coalesce(1), run)


def known(table: Dest) -> dict[str, str]:
    found = table.known()
    if found is None:
        return {}
    rows = [(row.path, row.version) for row in found.collect()]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def remove_rows(table: Dest, *paths: str) -> None:
    table.replace(table.stage_without(paths_of(table, *paths), RUN), RUN)


def paths_of(table: Dest, *paths: str) -> DataFrame:
    return table._spark.createDataFrame([(path,) for path in paths], "path string")


def files(table: Dest) -> set[str]:
    """Those that others would read, and what is beside them."""
    place = Path(table.path)
    found = (str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    return {name for name in found if not Path(name).name.startswith(".")}


def test_what_was_committed_is_published(table: Dest) -> None:
    assert known(table) == {} and table.known() is None
    put(table, "first", {"a": "1", "b": "1"}, {"x": "1"})
    assert known(table) == {}
    (errors,) = table.publish("first")
    assert errors.startswith(f"{table.path}/_errors/part-")
    assert [row.path for row in table.read([errors]).collect()] == ["x"]
    assert table.publish("first") == []
    assert known(table) == {"a": "1", "b": "1", "x": "1"}
    table.remove_work()
    assert [name.partition("part-")[0] for name in sorted(files(table))] == ["_errors/", ""]


def test_a_move_that_was_cut_off_is_made_again(table: Dest) -> None:
    """Some stores copy a file, and then delete it: both are there for a while."""
    put(table, "first", {"a": "1"}, {})
    (committed,) = Path(table.path).rglob("part-*.parquet")
    copy = Path(table.path) / committed.name
    copy.write_bytes(committed.read_bytes())
    table.recover("first")
    assert known(table) == {"a": "1"}
    assert files(table) == {copy.name}


def test_what_comes_too_late_is_left_out(table: Dest) -> None:
    put(table, "first", {"a": "1"}, {})
    put(table, "second", {"a": "2"}, {})
    table.recover("second")
    assert known(table) == {"a": "2"}


def test_rows_are_taken_out(table: Dest) -> None:
    put(table, "first", {"a": "1", "b": "1"}, {"x": "1"})
    put(table, "second", {"c": "1"}, {"y": "1"})
    for run in ("first", "second"):
        table.publish(run)
    remove_rows(table, "a", "x", "nothing")
    assert known(table) == {"b": "1", "c": "1", "y": "1"}
    table.remove_work()
    assert {name.partition("part-")[0] for name in files(table)} == {"", "_errors/"}


def test_known_keys_of_boxes_have_each_box_once(table: Dest) -> None:
    rows: list[Any] = [(key, "1", None, 3, "features") for key in ("whole", "whole", "torn")]
    rows += [
        ("whole", "1", "bad_box: null", 3, "errors"),
        ("lost", "1", "bad_box: null", 2, "errors"),
    ]
    rows += [("twice", "1", None, 1, "features")] * 2 + [("none", None, None, None, "errors")]
    rows += [("late", "1", "timed_out: ", None, "errors"), ("bad", "1", "empty: ", None, "errors")]
    schema = f"path string, version string, error string, box_count int, {KIND} string"
    table.write(table._spark.createDataFrame(rows, schema).coalesce(1), "first")
    table.publish("first")
    found = table.known(["timed_out"], by_box=True)
    assert found is not None
    keys = {row.path: row.is_retried for row in found.collect()}
    assert found.count() == len(keys) == 7
    assert {key for key, is_retried in keys.items() if is_retried} == {
        "torn",
        "lost",
        "twice",
        "late",
    }
    versions = {row.path: row.version for row in found.collect()}
    assert versions["whole"] == "1" and versions["none"] is None


class Stopped(Exception):
    pass


def stop() -> None:
    raise Stopped


@pytest.mark.parametrize("point", [point for point in POINTS if point != "first publication"])
def test_a_replacement_that_is_stopped(
    table: Dest, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """It is made, or not, but never half of it; and what is left can be replaced again."""
    before = {"a": "1", "b": "1", "x": "1", "y": "1"}
    put(table, "first", {"a": "1", "b": "1"}, {"x": "1", "y": "1"})
    table.publish("first")
    (Path(table.path) / "README.md").touch()  # if no part is in its place, this is not all there is
    with monkeypatch.context() as patch:
        stop_at(point, stop, patch.setattr)
        with pytest.raises(Stopped):
            remove_rows(table, "a", "b", "x")
    table.check_is_table()
    table.recover(None)
    assert known(table) == (before if point in ("before the list", CUT_OFF) else {"y": "1"})
    assert not any("_imagevec" in name for name in files(table))
    remove_rows(table, "a", "b", "x")
    assert known(table) == {"y": "1"}


def versions(folder: Path) -> dict[str, str]:
    """The versions of all rows by path, without Spark."""
    rows: list[dict[str, str]] = []
    for place in filter(Path.is_dir, (folder, folder / "_errors")):
        found = ds.dataset(place, format="parquet", ignore_prefixes=["_", "."])
        rows += found.to_table(columns=["path", "version"]).to_pylist() if found.files else []
    by_path = {row["path"]: row["version"] for row in rows}
    assert len(by_path) == len(rows)
    return by_path


@pytest.mark.parametrize("is_all", [False, True], ids=["some rows", "all rows"])
def test_failure_at_any_step_of_a_replacement_loses_no_row(
    table: Dest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_all: bool
) -> None:
    """As ``extract`` does: on any error it recovers if it can, and the next run recovers again."""
    before = {"a": "1", "b": "1", "x": "1", "y": "1"}
    put(table, "first", {"a": "1", "b": "1"}, {"x": "1", "y": "1"})
    table.publish("first")
    if is_all:  # as with overwrite=True
        frame = table._spark.createDataFrame(
            [("n", "2", "features")], f"path string, version string, {KIND} string"
        )
        table.write(frame, RUN, is_staged=True)
        old, after = table.files(), {"n": "2"}
    else:
        old, after = table.stage_without(paths_of(table, "a", "x"), RUN), {"b": "1", "y": "1"}
    for error, is_lasting in ((KeyboardInterrupt, False), (OSError, True)):
        number, calls = 0, 1
        while number < calls:
            copy = Dest(table._spark, str(tmp_path / f"copy-{number}-{is_lasting}"))
            shutil.copytree(table.path, copy.path)
            with monkeypatch.context() as patch:
                count = fail_at(number, patch.setattr, error, is_lasting)
                try:
                    copy.replace(old, RUN)
                except error:
                    with contextlib.suppress(error):
                        copy.recover(RUN)
                calls = count()
            copy.recover(None)
            assert versions(Path(copy.path)) == (after if number else before), number
            assert list(Path(copy.work).iterdir()) == []
            number += 1
        assert number > 8


def test_a_moved_or_copied_table_completes_its_own_replacement(
    table: Dest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(table, "first", {"a": "1", "b": "1"}, {"x": "1"})
    table.publish("first")
    with monkeypatch.context() as patch:
        stop_at("first deletion", stop, patch.setattr)
        with pytest.raises(Stopped):
            remove_rows(table, "a", "x")
    before = files(table)
    copy = Dest(table._spark, str(tmp_path / "copy"))
    shutil.copytree(table.path, copy.path)
    copy.recover(None)
    assert known(copy) == {"b": "1"}
    assert files(table) == before
    moved = Dest(table._spark, str(tmp_path / "moved"))
    Path(table.path).rename(moved.path)
    moved.recover(None)
    assert known(moved) == {"b": "1"}


@pytest.mark.parametrize(
    "journal",
    [
        {"run": RUN, "old": ["{victim}"]},
        {"run": RUN, "old": ["file:{victim}"]},
        {"run": RUN, "old": ["../victim/part-0.parquet"]},
        {"run": RUN, "old": ["part-0.parquet", "_errors/../../victim/part-0.parquet"]},
        {"run": RUN, "old": ["_errors"]},
        {"run": RUN, "old": [".."]},
        {"run": RUN, "old": ["sub/part-0.parquet"]},
        {"run": RUN, "old": ["mine.txt"]},
        {"run": RUN, "old": [1]},
        {"run": RUN, "old": None},
        {"run": "../../../victim", "old": []},
        {"run": 7, "old": []},
        {"old": []},
        ["part-0.parquet"],
        7,
    ],
)
def test_a_journal_that_names_other_files_is_refused(
    spark: SparkSession, tmp_path: Path, journal: Any
) -> None:
    victim = write_table(tmp_path / "victim", {"v": [1.0]})
    table = Dest(spark, str(write_table(tmp_path / "dest", {"a": [1.0]})))
    (tmp_path / "dest" / "mine.txt").touch()
    text = json.dumps(journal).replace("{victim}", str(next(victim.iterdir())))
    table._folder.write_text(f"{table.work}/replace.json", text)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ImageVecError, match=r"replace.json names what is not a file of this table"):
        table.recover(None)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_publication_that_is_stopped(table: Dest, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, "first", {"a": "1"}, {"x": "1"})
    with monkeypatch.context() as patch:
        stop_at("first publication", stop, patch.setattr)
        with pytest.raises(Stopped):
            table.publish("first")
    assert known(table) == {"a": "1"}
    table.recover("first")
    assert known(table) == {"a": "1", "x": "1"}


def test_what_lies_beside_a_table_is_spared(spark: SparkSession, tmp_path: Path) -> None:
    vectorizer = ImageVectorizer(model=tiny, weights="random", engine="torch")
    df = spark.createDataFrame([("a", b"")], "path string, image binary")
    df = vectorizer.process_images(df, "image", "features")
    df.select("path", "features").write.parquet(str(tmp_path / "dest"))
    table = Dest(spark, str(tmp_path / "dest"))
    mine = {"mine.txt", "_mine.parquet", "mine.parquet/mine.parquet"}
    for name in mine:
        (tmp_path / "dest" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dest" / name).touch()
    (tmp_path / "dest" / "_errors").mkdir()
    table.check_is_features()
    table.replace(table.files(), RUN)
    table.remove_work()
    assert files(table) == {*mine, "_SUCCESS"}
    assert not (tmp_path / "dest" / "_errors").exists()


@pytest.mark.parametrize("text", ["", "{", '{"run": "0a", "old": ["part-0.parq'])
def test_a_list_of_replaced_files_that_was_cut_off(table: Dest, text: str) -> None:
    """Nothing was deleted by then, so that the files of before are kept."""
    put(table, "first", {"a": "1"}, {})
    table.publish("first")
    table._folder.write_text(f"{table.work}/replace.json", text)
    table.recover(None)
    assert known(table) == {"a": "1"}
    assert not (Path(table.work) / "replace.json").exists()


def test_something_else_in_its_place(spark: SparkSession, tmp_path: Path) -> None:
    Dest(spark, str(tmp_path / "nothing")).check_is_table()
    for names in ((), ("_imagevec",), ("_imagevec", "_errors")):  # of a run that was killed
        for name in names:
            (tmp_path / "begun" / name).mkdir(parents=True, exist_ok=True)
        Dest(spark, str(tmp_path / "begun")).check_is_table()
    (tmp_path / "begun" / "mine.txt").touch()
    with pytest.raises(OptionError, match="exists and has no features: choose another DEST"):
        Dest(spark, str(tmp_path / "begun")).check_is_table()


def test_a_table_of_something_else(spark: SparkSession, tmp_path: Path) -> None:
    """Neither added to nor replaced."""
    spec = ImageVectorizer(model=tiny, weights="random", engine="torch").spec
    spark.range(3).write.parquet(str(tmp_path / "numbers"))
    write_table(tmp_path / "vectors", {"a": [1.0, 2.0]})
    for name, said in (("numbers", "there is no column 'features'"), ("vectors", "no provenance")):
        table = Dest(spark, str(tmp_path / name))
        table.check_is_table()
        before = files(table)
        with pytest.raises((OptionError, FingerprintError), match=said):
            table.check_is_features()
        with pytest.raises((OptionError, FingerprintError), match=said):
            table.check(spec, ("path", "features"), StructType())
        assert files(table) == before


def test_many_files_are_moved_while_others_are_written(table: Dest) -> None:
    for run in range(3):
        rows = table._spark.range(0, 20, 1, 10).select(
            F.concat(F.lit(f"{run}-"), F.col("id").cast("string")).alias("path"),
            F.lit("1").alias("version"),
            F.when(F.col("id") % 3 == 0, "errors").otherwise("features").alias(KIND),
        )
        table.write(rows, str(run))
        table.publish(str(run))
    assert len(known(table)) == 60
