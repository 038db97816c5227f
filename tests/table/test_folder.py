"""The table of features as files: what is put in, taken out, cut off and found again."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from pyarrow import parquet
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from imagevec import FingerprintError, ImageVecError, ImageVectorizer, OptionError, ReadError
from imagevec.storage.folder import Folder
from imagevec.table.dest import check_outside
from imagevec.table.folder import FolderTable
from imagevec.table.publish import Published, Publisher
from tests.helpers.factories import tiny
from tests.helpers.stops import CUT_OFF, POINTS, fail_at, stop_at
from tests.helpers.tables import write_table

RUN, FIRST, SECOND, NEXT = "0a1b2c", "01", "02", "03"


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


def at(spark: SparkSession, path: Path) -> FolderTable:
    return FolderTable(spark, Folder(path))


class Unfenced:
    def check(self) -> None:
        pass

    def end_earlier(self) -> None:
        pass


def begin(table: FolderTable, run: str) -> None:
    """Gives a run an epoch, without which its journal would not count."""
    owner = {"run": run, "host": "", "place": "", "process": 1, "start": "", "user": ""}
    table.work.write("epochs/0000000000000001", json.dumps(owner).encode())


FENCE = Unfenced()


@pytest.fixture
def table(spark: SparkSession, tmp_path: Path) -> FolderTable:
    """Its place has a name that Hadoop and URIs could take for something else."""
    return at(spark, tmp_path / "a {b} [c]* %20 #?")


def put(
    table: FolderTable,
    run: str,
    features: dict[str, str],
    errors: dict[str, str],
    *,
    attempt: int = 0,
    is_changed: bool = False,
) -> None:
    """Writes paths and their versions, as a task does."""
    rows = {"features": list(features.items()), "errors": list(errors.items())}
    stem = f"part-{run}-00000-{attempt}-0000{'b' if features and errors else ''}"
    for kind, pairs in rows.items():
        error = None if kind == "features" else "empty: 0 bytes"
        columns = [{"path": path, "version": version, "error": error} for path, version in pairs]
        if columns:
            prefix = "changed-" if is_changed else ""
            put_file(table, run, f"{prefix}{kind}.{stem}.parquet", columns)


def put_file(table: FolderTable, run: str, name: str, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
    table.run_folder(run).write(name, sink.getvalue().to_pybytes())


SCHEMA = pa.schema([(name, pa.string()) for name in ("path", "version", "error")])


def publish(table: FolderTable, run: str) -> Published:
    publisher = Publisher(table, FENCE, run)
    publisher.look()
    table.finish(run, (), FENCE.check)
    return publisher.published


def known(table: FolderTable) -> dict[str, str]:
    found = table.known()
    if found is None:
        return {}
    rows = [(row.path, row.version) for row in found.collect()]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def remove_rows(table: FolderTable, *paths: str) -> None:
    begin(table, RUN)
    table.finish(RUN, paths, FENCE.check)


def files(table: FolderTable) -> set[str]:
    """Those that others would read, and what is beside them."""
    place = Path(table.path)
    found = (str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    found = (name for name in found if "epochs" not in name)
    return {name for name in found if not Path(name).name.startswith(".")}


def test_parts_of_tasks_are_published(table: FolderTable) -> None:
    assert known(table) == {} and table.known() is None
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1"})
    assert known(table) == {}
    published = publish(table, FIRST)
    assert (published.images, published.features, published.errors) == (3, 2, {"empty": 1})
    assert publish(table, FIRST).images == 0
    assert known(table) == {"a": "1", "b": "1", "x": "1"}
    table.remove_work(RUN)
    assert [name.partition("part-")[0] for name in sorted(files(table))] == ["_errors/", ""]


def test_part_with_two_files_waits_for_both(table: FolderTable) -> None:
    put(table, FIRST, {"a": "1"}, {"x": "1"})
    folder = table.run_folder(FIRST)
    (errors,) = (name for name in folder.names() if name.startswith("errors"))
    data = folder.read(errors)
    assert data is not None
    folder.delete(errors)
    assert publish(table, FIRST).images == 0
    folder.write(errors, data)
    assert publish(table, FIRST).images == 2


def test_overlapping_attempts_are_published_once(table: FolderTable) -> None:
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1"}, attempt=1)
    publisher = Publisher(table, FENCE, FIRST)
    publisher.look()
    put(table, FIRST, {"b": "1", "c": "1"}, {"x": "1", "y": "1"}, attempt=2)
    put(table, FIRST, {"a": "1"}, {}, attempt=3)
    publisher.look()
    assert known(table) == {"a": "1", "b": "1", "c": "1", "x": "1", "y": "1"}
    assert publisher.published.images == 5
    assert (publisher.published.features, publisher.published.errors) == (3, {"empty": 2})


def test_dead_runs_are_adopted_by_key(table: FolderTable) -> None:
    """A driver died after it had published the first part; another attempt had the same rows."""
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1"}, attempt=1)
    publish(table, FIRST)
    put(table, FIRST, {"b": "1", "c": "1"}, {"x": "1"}, attempt=2)
    put(table, FIRST, {"c": "1", "d": "1"}, {}, attempt=3)
    table.recover(FENCE, NEXT)
    assert known(table) == {"a": "1", "b": "1", "c": "1", "d": "1", "x": "1"}
    assert not any("_imagevec" in name for name in files(table))


def test_changed_rows_of_a_dead_run_replace_others(table: FolderTable) -> None:
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1"})
    publish(table, FIRST)
    put(table, SECOND, {"a": "2", "x": "2"}, {}, is_changed=True)
    table.recover(FENCE, NEXT)
    assert known(table) == {"a": "2", "b": "1", "x": "2"}


@pytest.mark.parametrize("content", [b"", b"PAR1", "half"])
def test_damaged_part_of_a_dead_run_is_deleted(
    table: FolderTable, content: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    put(table, FIRST, {"a": "1"}, {}, attempt=1)
    put(table, FIRST, {"b": "1"}, {}, attempt=2)
    folder = table.run_folder(FIRST)
    first, _ = folder.names()
    data = folder.read(first) or b""
    folder.write(first, data[: len(data) // 2] if isinstance(content, str) else content)
    table.recover(FENCE, NEXT)
    assert known(table) == {"b": "1"}
    assert f"{first} is damaged" in caplog.text


def test_part_whose_keys_cannot_be_read_is_deleted(table: FolderTable) -> None:
    """Arrow raises errors of several classes, depending on where damaged bytes are."""
    put(table, FIRST, {"a": "1"}, {})
    folder = table.run_folder(FIRST)
    (name,) = folder.names()
    data, deleted = folder.read(name) or b"", 0
    for start in range(0, len(data) - 8, 16):
        folder.write(name, data[:start] + bytes(16) + data[start + 16 :])
        table.recover(FENCE, NEXT)
        assert not any("_imagevec" in name for name in files(table))
        deleted += not files(table)
        shutil.rmtree(table.path)
    assert deleted > 10


def test_failed_read_does_not_delete_parts(
    table: FolderTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(table, FIRST, {"a": "1"}, {})
    publish(table, FIRST)
    put(table, SECOND, {"a": "2"}, {}, is_changed=True)

    def fail(folder: Folder, path: str) -> Any:
        raise ReadError("503")

    with monkeypatch.context() as patch, pytest.raises(ReadError):
        patch.setattr(Folder, "open", fail)
        table.recover(FENCE, NEXT)
    table.recover(FENCE, NEXT)
    assert known(table) == {"a": "2"}


def test_damaged_part_of_this_run_fails_it(table: FolderTable) -> None:
    put(table, FIRST, {"a": "1"}, {})
    (name,) = table.run_folder(FIRST).names()
    table.run_folder(FIRST).write(name, b"PAR1")
    with pytest.raises(ImageVecError, match="is damaged: run extract again"):
        publish(table, FIRST)


def test_fenced_run_publishes_nothing(table: FolderTable) -> None:
    class Fenced:
        def check(self) -> None:
            raise ImageVecError("another run took over")

        def end_earlier(self) -> None:
            raise ImageVecError("another run took over")

    put(table, FIRST, {"a": "1"}, {})
    with pytest.raises(ImageVecError, match="took over"):
        Publisher(table, Fenced(), FIRST).look()
    assert known(table) == {}


def test_paths_are_removed(table: FolderTable) -> None:
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1"})
    put(table, SECOND, {"c": "1"}, {"y": "1"})
    for run in (FIRST, SECOND):
        publish(table, run)
    remove_rows(table, "a", "x", "nothing")
    assert known(table) == {"b": "1", "c": "1", "y": "1"}
    table.remove_work(RUN)
    assert {name.partition("part-")[0] for name in files(table)} == {"", "_errors/"}


def test_known_keys_of_boxes_have_each_box_once(table: FolderTable) -> None:
    schema = SCHEMA.append(pa.field("box_count", pa.int32()))
    features: list[Any] = [(key, "1", None, 3) for key in ("whole", "whole", "torn")]
    features += [("twice", "1", None, 1)] * 2
    errors: list[Any] = [("whole", "1", "bad_box: null", 3), ("lost", "1", "bad_box: null", 2)]
    errors += [("none", None, None, None), ("late", "1", "timed_out: ", None)]
    errors += [("bad", "1", "empty: ", None)]
    for place, rows in (("", features), ("_errors", errors)):
        columns = [dict(zip(schema.names, row, strict=True)) for row in rows]
        folder = Path(table.path) / place
        folder.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(columns, schema), folder / "part-0.parquet")
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
    table: FolderTable, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """It is made, or not, but never half of it; and what is left can be replaced again."""
    before = {"a": "1", "b": "1", "x": "1", "y": "1"}
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1", "y": "1"})
    publish(table, FIRST)
    (Path(table.path) / "README.md").touch()  # so that parts are not all there is
    with monkeypatch.context() as patch:
        stop_at(point, stop, patch.setattr)
        with pytest.raises(Stopped):
            remove_rows(table, "a", "b", "x")
    table.check_is_table()
    table.recover(FENCE, NEXT)
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
    table: FolderTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_all: bool
) -> None:
    """As ``extract`` does: on any error it recovers if it can, and the next run recovers again."""
    before = {"a": "1", "b": "1", "x": "1", "y": "1"}
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1", "y": "1"})
    publish(table, FIRST)
    if is_all:  # as with overwrite=True
        begin(table, RUN)
        put(table.replacement(), RUN, {"n": "2"}, {})
        Publisher(table.replacement(), FENCE, RUN).look()
        after = {"n": "2"}
    else:
        begin(table, RUN)
        put(table, RUN, {"a": "2"}, {"x": "2"}, is_changed=True)
        Publisher(table, FENCE, RUN).look()
        after = {"a": "2", "b": "1", "x": "2", "y": "1"}

    def replace(copy: FolderTable) -> None:
        if is_all:
            copy.replace_by_replacement(RUN, FENCE.check)
        else:
            copy.finish(RUN, (), FENCE.check)

    for error, is_lasting in ((KeyboardInterrupt, False), (OSError, True)):
        number, calls = 0, 1
        found: list[dict[str, str]] = []
        while number < calls:
            copy = at(table._spark, (tmp_path / f"copy-{number}-{is_lasting}"))
            shutil.copytree(table.path, copy.path)
            with monkeypatch.context() as patch:
                count = fail_at(number, patch.setattr, error, is_lasting)
                try:
                    replace(copy)
                except error:
                    with contextlib.suppress(error):
                        copy.recover(FENCE, NEXT)
                calls = count()
            copy.recover(FENCE, NEXT)
            found.append(versions(Path(copy.path)))
            copy.remove_work(RUN)
            assert [path.name for path in Path(copy.work.path).iterdir()] == ["epochs"]
            number += 1
        is_replaced = [rows == after for rows in found]
        assert all(rows in (before, after) for rows in found)
        assert is_replaced == sorted(is_replaced) and is_replaced[-1]
        assert number > 8


def test_a_moved_or_copied_table_completes_its_own_replacement(
    table: FolderTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(table, FIRST, {"a": "1", "b": "1"}, {"x": "1"})
    publish(table, FIRST)
    with monkeypatch.context() as patch:
        stop_at("first deletion", stop, patch.setattr)
        with pytest.raises(Stopped):
            remove_rows(table, "a", "x")
    before = files(table)
    copy = at(table._spark, (tmp_path / "copy"))
    shutil.copytree(table.path, copy.path)
    copy.recover(FENCE, NEXT)
    assert known(copy) == {"b": "1"}
    assert files(table) == before
    moved = at(table._spark, (tmp_path / "moved"))
    Path(table.path).rename(moved.path)
    moved.recover(FENCE, NEXT)
    assert known(moved) == {"b": "1"}


@pytest.mark.parametrize(
    "journal",
    [
        {"source": RUN, "new": [], "old": ["{victim}"]},
        {"source": RUN, "new": [], "old": ["file:{victim}"]},
        {"source": RUN, "new": [], "old": ["../victim/part-0.parquet"]},
        {
            "source": RUN,
            "new": [],
            "old": ["part-0.parquet", "_errors/../../victim/part-0.parquet"],
        },
        {"source": RUN, "new": [], "old": ["_errors"]},
        {"source": RUN, "new": [], "old": [".."]},
        {"source": RUN, "new": [], "old": ["sub/part-0.parquet"]},
        {"source": RUN, "new": [], "old": ["mine.txt"]},
        {"source": RUN, "new": [], "old": [1]},
        {"source": RUN, "new": [], "old": None},
        {"source": "../../../victim", "old": [], "new": []},
        {"source": 7, "old": [], "new": []},
        {"source": RUN, "old": [], "new": ["../../victim/part-0.parquet"]},
        {"old": []},
        ["part-0.parquet"],
        7,
    ],
)
def test_a_journal_that_names_other_files_is_refused(
    spark: SparkSession, tmp_path: Path, journal: Any
) -> None:
    victim = write_table(tmp_path / "victim", {"v": [1.0]})
    table = at(spark, write_table(tmp_path / "dest", {"a": [1.0]}))
    (tmp_path / "dest" / "mine.txt").touch()
    text = json.dumps(journal).replace("{victim}", str(next(victim.iterdir())))
    begin(table, RUN)
    table.work.write(f"replace-{RUN}.json", text.encode())
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ImageVecError, match=rf"replace-{RUN}.json names what is not a file of this table"
    ):
        table.recover(FENCE, NEXT)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_publication_that_is_stopped(table: FolderTable, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, FIRST, {"a": "1"}, {"x": "1"})
    with monkeypatch.context() as patch:
        stop_at("first publication", stop, patch.setattr)
        with pytest.raises(Stopped):
            publish(table, FIRST)
    assert known(table) == {"x": "1"}
    table.recover(FENCE, NEXT)
    assert known(table) == {"a": "1", "x": "1"}


def test_what_lies_beside_a_table_is_spared(spark: SparkSession, tmp_path: Path) -> None:
    vectorizer = ImageVectorizer(model=tiny, weights="random", engine="torch")
    df = spark.createDataFrame([("a", b"")], "path string, image binary")
    df = vectorizer.process_images(df, "image", "features")
    df.select("path", "features").write.parquet(str(tmp_path / "dest"))
    table = at(spark, (tmp_path / "dest"))
    mine = {"mine.txt", "_mine.parquet", "mine.parquet/mine.parquet"}
    for name in mine:
        (tmp_path / "dest" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dest" / name).touch()
    (tmp_path / "dest" / "_errors").mkdir()
    table.check_is_features()
    table.replace_by_replacement(RUN, FENCE.check)
    table.remove_work(RUN)
    assert files(table) == {*mine, "_SUCCESS"}
    assert not (tmp_path / "dest" / "_errors").exists()


@pytest.mark.parametrize("text", ["", "{", '{"source": "0a", "old": ["part-0.parq'])
def test_a_list_of_replaced_files_that_was_cut_off(table: FolderTable, text: str) -> None:
    """Nothing was deleted by then, so that the files of before are kept."""
    put(table, FIRST, {"a": "1"}, {})
    publish(table, FIRST)
    begin(table, RUN)
    table.work.write(f"replace-{RUN}.json", text.encode())
    table.recover(FENCE, NEXT)
    assert known(table) == {"a": "1"}
    assert not (Path(table.work.path) / f"replace-{RUN}.json").exists()


def test_something_else_in_its_place(spark: SparkSession, tmp_path: Path) -> None:
    at(spark, (tmp_path / "nothing")).check_is_table()
    for names in ((), ("_imagevec",), ("_imagevec", "_errors")):  # of a run that was killed
        for name in names:
            (tmp_path / "begun" / name).mkdir(parents=True, exist_ok=True)
        at(spark, (tmp_path / "begun")).check_is_table()
    (tmp_path / "begun" / "mine.txt").touch()
    with pytest.raises(OptionError, match="exists and has no features: choose another DEST"):
        at(spark, (tmp_path / "begun")).check_is_table()


def test_a_table_of_something_else(spark: SparkSession, tmp_path: Path) -> None:
    """Neither added to nor replaced."""
    spec = ImageVectorizer(model=tiny, weights="random", engine="torch").spec
    spark.range(3).write.parquet(str(tmp_path / "numbers"))
    write_table(tmp_path / "vectors", {"a": [1.0, 2.0]})
    for name, said in (("numbers", "there is no column 'features'"), ("vectors", "no provenance")):
        table = at(spark, (tmp_path / name))
        table.check_is_table()
        before = files(table)
        with pytest.raises((OptionError, FingerprintError), match=said):
            table.check_is_features()
        with pytest.raises((OptionError, FingerprintError), match=said):
            table.check(spec, ("path", "features"), StructType())
        assert files(table) == before
