"""The table of features as files: what is put in, taken out, cut off and found again."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from imagevec import FingerprintError, ImageVectorizer, OptionError
from imagevec.table.dest import KIND, Dest, check_outside
from tests.helpers.factories import tiny
from tests.helpers.stops import CUT_OFF, POINTS, stop_at
from tests.helpers.tables import write_table


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
    rows = [(*row, "features") for row in features.items()]
    rows += [(*row, "errors") for row in errors.items()]
    frame = table._spark.createDataFrame(rows, f"path string, version string, {KIND} string")
    table.write(frame.coalesce(1), run)


def known(table: Dest) -> dict[str, str]:
    found = table.known()
    if found is None:
        return {}
    rows = [tuple(row) for row in found.collect()]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


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
    gone = table._spark.createDataFrame([("a",), ("x",), ("nothing",)], "path string")
    table.take_out(gone)
    assert known(table) == {"b": "1", "c": "1", "y": "1"}
    table.remove_work()
    assert {name.partition("part-")[0] for name in files(table)} == {"", "_errors/"}


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
    gone = table._spark.createDataFrame([("a",), ("b",), ("x",)], "path string")
    with monkeypatch.context() as patch:
        stop_at(point, stop, patch.setattr)
        with pytest.raises(Stopped):
            table.take_out(gone)
    table.check_is_table()
    table.recover(None)
    assert known(table) == (before if point in ("before the list", CUT_OFF) else {"y": "1"})
    assert not any("_imagevec" in name for name in files(table))
    table.take_out(gone)
    assert known(table) == {"y": "1"}


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
    (tmp_path / "dest" / "mine.txt").touch()
    (tmp_path / "dest" / "_errors").mkdir()
    table.clear()
    assert files(table) == {"mine.txt", "_SUCCESS"}


@pytest.mark.parametrize("text", ["", "[", '["file:/x/part-0.parq'])
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
            table.clear()
        with pytest.raises((OptionError, FingerprintError), match=said):
            table.check(spec, ("path", "features"))
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
