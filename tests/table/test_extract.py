"""``imagevec.extract``, in a session that stays: its sources, its report, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from imagevec import (
    ExtractReport,
    FingerprintError,
    ImageVecError,
    OptionError,
    ReadError,
    extract,
)
from imagevec.spark.sessions import read_table
from imagevec.table.extract import _watching
from imagevec.table.fence import _place
from imagevec.table.folder import FolderTable
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved, vector_of
from tests.helpers.stops import fail_at, stop_at

MODEL: dict[str, Any] = {"model": tiny, "weights": "random"}

Extract = Callable[..., ExtractReport]


def image(seed: int) -> bytes:
    return encode(photo(30, 20, seed=seed))


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "dest"


@pytest.fixture
def run(spark: SparkSession, dest: Path) -> Extract:
    """Extracts features of a source into ``dest``."""

    def extract_to_dest(src: Any, **options: Any) -> ExtractReport:
        return extract(src, dest, spark=spark, **{**MODEL, "engine": "torch", **options})

    return extract_to_dest


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """By path: each is there once."""
    found = ds.dataset(folder, format="parquet", ignore_prefixes=["_", "."])
    by_path = {row["path"]: row for row in found.to_table().to_pylist()}
    assert len(by_path) == found.count_rows()
    return by_path


def assert_is_vector_of(row: dict[str, Any], data: bytes) -> None:
    assert row["features"] == pytest.approx(vector_of(data, **MODEL), rel=1e-3, abs=1e-5)


def assert_one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert "\n" not in str(error.value)


# Files.


def test_files_of_all_kinds(run: Extract, tmp_path: Path, dest: Path) -> None:
    src = tmp_path / "photos"
    src.mkdir()
    for seed, name in enumerate(["a:b.png", "100%.png", "a%20b.png", "{x}.png", "ü .png"]):
        (src / name).write_bytes(image(seed))
    (src / "empty.png").touch()
    for raw in (b".x.png", b"_x.png", b"\xff.png"):
        (src / os.fsdecode(raw)).write_bytes(image(9))
    (src / "gone.png").symlink_to(src / "nothing")
    (src / "sub").mkdir()
    report = run(src)
    assert report == ExtractReport(
        found=6,
        done_before=0,
        features=5,
        errors={"empty": 1},
        nulls=0,
        skipped={"hidden": 2, "name is not UTF-8": 1, "dangling link": 1, "subfolder": 1},
        seconds=report.seconds,
        fingerprint=report.fingerprint,
        dest=str(dest),
    )
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    done = rows(dest)
    names = {"a:b.png", "100%.png", "a%20b.png", "{x}.png", "ü .png"}
    assert done.keys() == {f"file:{src / name}" for name in names}
    assert_is_vector_of(done[f"file:{src}/a:b.png"], image(0))
    assert rows(dest / "_errors").keys() == {f"file:{src}/empty.png"}
    assert not (dest / "_imagevec").exists()

    again = run(src)
    assert (again.found, again.done_before) == (6, 6)
    assert (again.features, again.errors, again.nulls) == (0, {}, 0)


def test_a_source_is_looked_at_before_the_model(run: Extract, tmp_path: Path, dest: Path) -> None:
    for name in ("nothing", "no*thing"):
        src = tmp_path / name
        with pytest.raises(OptionError, match=r"does not exist|matches nothing") as raised:
            run(src, model="resnet5000")
        assert str(src) in str(raised.value)
    for format in ("parquet", "binaryFile"):
        with pytest.raises(OptionError, match="nothing does not exist"):
            run(tmp_path / "nothing", format=format, column="content", model="resnet5000")
    with pytest.raises(OptionError, match="nothing does not exist"):
        run(tmp_path / "nothing", format="webdataset", model="resnet5000")
    assert not dest.exists()


def test_a_source_without_images(run: Extract, tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / "sub" / "a.png").write_bytes(image(0))
    said = r"no images found \(1 subfolder\): recursive=True includes subfolders"
    with pytest.raises(OptionError, match=said):
        run(tmp_path / "photos")
    assert not (tmp_path / "dest" / "_imagevec").exists()
    with pytest.raises(OptionError, match="no images found$"):
        run(tmp_path / "photos", recursive=True, pattern="*.jpg")
    assert run(tmp_path / "photos", recursive=True).features == 1


# Tables.

TABLE = "id string, jpeg binary, label int, split string"


@pytest.fixture
def table(spark: SparkSession) -> DataFrame:
    """Four rows: an image twice, a null and what is no image; with other columns."""
    data = [image(0), image(1), None, b"no image"]
    splits = ["train", "test", "train", "train"]
    found = zip(["a", "b", "c", "d"], data, range(4), splits, strict=True)
    return spark.createDataFrame(list(found), TABLE)


def test_a_table_with_columns_to_keep(
    run: Extract, table: DataFrame, tmp_path: Path, dest: Path
) -> None:
    table.write.orc(str(tmp_path / "images"))
    options = {"format": "orc", "column": "jpeg", "key": "id", "keep": ["label", "split"]}
    train = run(tmp_path / "images", where="split = 'train'", **options)
    assert (train.found, train.features, train.nulls) == (3, 1, 1)
    assert train.errors == {"unsupported_format": 1}
    report = run(tmp_path / "images", **options)
    assert (report.found, report.done_before, report.features) == (4, 3, 1)
    done = rows(dest)
    assert {key: (row["label"], row["split"]) for key, row in done.items()} == {
        "a": (0, "train"),
        "b": (1, "test"),
    }
    assert_is_vector_of(done["b"], image(1))
    assert done["b"]["length"] == len(image(1)) and done["b"]["modificationTime"] is None
    bad = rows(dest / "_errors")
    assert bad["c"]["error"] is None and bad["c"]["label"] == 2
    assert bad["d"]["error"].startswith("unsupported_format:") and bad["d"]["label"] == 3
    assert list(done["a"]) == list(bad["c"])
    with pytest.raises(OptionError, match="keep the same columns, or use overwrite=True") as raised:
        run(tmp_path / "images", **{**options, "keep": "label"})
    assert_one_line(raised)


def test_kept_column_of_another_type_is_refused(
    run: Extract, table: DataFrame, spark: SparkSession, dest: Path
) -> None:
    options = {"column": "jpeg", "key": "id", "keep": ["label", "split"]}
    run(table.where("label < 1"), **options)
    texts = table.withColumn("label", F.col("label").cast("string"))
    said = "column 'label' of type int, not string: keep a column of the same type, or use"
    with pytest.raises(OptionError, match=said) as raised:
        run(texts, **options)
    assert_one_line(raised)
    assert run(table.where("label < 2"), **options).features == 1
    assert spark.read.parquet(str(dest)).count() == 2
    assert run(texts, **options, overwrite=True).features == 2
    assert {row["label"] for row in rows(dest).values()} == {"0", "1"}


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (["label", "Label"], "give it once"),
        (["imagevec_kind"], "imagevec itself uses imagevec_"),
    ],
)
def test_kept_columns_that_would_clash_are_refused(
    run: Extract, table: DataFrame, keep: list[str], said: str
) -> None:
    df = table.withColumn("imagevec_kind", F.lit("x"))
    with pytest.raises(OptionError, match=said):
        run(df, column="jpeg", key="id", keep=keep)


def test_kept_columns_may_have_any_other_name(
    run: Extract, spark: SparkSession, dest: Path
) -> None:
    names = ["image", "kind", "result", "source_error", "is_known", "changed", "a.b", "c`d"]
    schema = "id string, content binary, " + ", ".join(
        f"`{name.replace('`', '``')}` string" for name in names
    )
    df = spark.createDataFrame([("1", image(0), *names)], schema)
    run(df, column="content", key="id", keep=names)
    (row,) = rows(dest).values()
    assert {name: row[name] for name in names} == {name: name for name in names}


def test_a_table_that_changes(run: Extract, spark: SparkSession, dest: Path) -> None:
    """By a hash of the bytes: another image of the same length is noticed, too."""
    first, second = image(0), bytearray(image(0))
    second[0] ^= 1  # it is no image any more
    schema = "id bigint, content binary"

    def table(data: bytes) -> DataFrame:
        return spark.createDataFrame([(1, bytearray(data)), (2, bytearray(image(2)))], schema)

    options = {"column": "content", "key": "id"}
    assert run(table(bytes(second)), **options).found == 2
    report = run(table(first), **options)
    assert (report.done_before, report.features) == (1, 1)
    assert rows(dest).keys() == {"1", "2"}
    assert not (dest / "_errors").exists()
    assert_is_vector_of(rows(dest)["1"], first)
    assert run(table(first), **options).features == 0
    # A row that is gone keeps its vector.
    assert run(table(first).where("id = 2"), **options).done_before == 1
    assert rows(dest).keys() == {"1", "2"}


def test_a_version_says_what_has_changed(run: Extract, spark: SparkSession, dest: Path) -> None:
    def table(*versions: int | None) -> DataFrame:
        found = [(f"{n}", image(10 * n + (v or 0)), v) for n, v in enumerate(versions)]
        return spark.createDataFrame(found, "id string, content binary, edition int")

    options = {"column": "content", "key": "id", "version": "edition"}
    assert run(table(1, 1, None), **options).features == 3
    assert run(table(1, 2, None), **options).features == 1
    assert {key: row["version"] for key, row in rows(dest).items()} == {
        "0": "1",
        "1": "2",
        "2": None,
    }
    assert_is_vector_of(rows(dest)["1"], image(12))
    assert run(table(1, 2, 1), **options).features == 1


def test_a_table_of_paths(run: Extract, spark: SparkSession, tmp_path: Path, dest: Path) -> None:
    (tmp_path / "1.png").write_bytes(image(1))
    paths = [str(tmp_path / "1.png"), str(tmp_path / "nothing.png"), "nope://x/y.png"]
    df = spark.createDataFrame([(path,) for path in paths], "file string")
    report = run(df, column="file")
    assert (report.features, report.errors) == (1, {"unreadable_path": 2})
    assert_is_vector_of(rows(dest)[paths[0]], image(1))
    assert rows(dest / "_errors").keys() == set(paths[1:])
    assert run(df, column="file").done_before == 3


def test_a_table_of_hugging_face(
    run: Extract, spark: SparkSession, tmp_path: Path, dest: Path
) -> None:
    (tmp_path / "2.png").write_bytes(image(2))
    found = [((image(1), "1.png"), 7), ((None, str(tmp_path / "2.png")), 8), ((None, None), 9)]
    schema = "image struct<bytes: binary, path: string>, label int"
    df = spark.createDataFrame(found, schema)
    df.where("image.path IS NOT NULL").write.parquet(str(tmp_path / "images"))
    report = run(tmp_path / "images", column="image", keep="label")
    assert (report.features, report.nulls, report.errors) == (2, 0, {})
    done = rows(dest)
    assert_is_vector_of(done["1.png"], image(1))
    assert_is_vector_of(done[str(tmp_path / "2.png")], image(2))
    assert done["1.png"]["label"] == 7
    assert run(df, column="image", key="label", overwrite=True).nulls == 1


def test_spark_s_binary_files(
    run: Extract, spark: SparkSession, tmp_path: Path, dest: Path
) -> None:
    src = tmp_path / "photos"
    src.mkdir()
    for seed in range(3):
        (src / f"{seed}.png").write_bytes(image(seed))
    options = {"format": "binaryFile", "column": "content"}
    assert run(src, **options).features == 3
    row = rows(dest)[f"file:{src}/1.png"]
    status = (src / "1.png").stat()
    assert row["length"] == status.st_size
    os.utime(src / "1.png", (1, 1))
    assert run(src, **options).features == 1
    assert len(rows(dest)) == 3


def test_a_table_of_the_catalog(run: Extract, spark: SparkSession, table: DataFrame) -> None:
    table.createOrReplaceTempView("images_of_extract")
    assert run("images_of_extract", format="table", column="jpeg", key="id").features == 2
    with pytest.raises(ImageVecError, match="no_such_table") as raised:
        run("no_such_table", format="table", column="jpeg", key="id")
    assert_one_line(raised)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"column": "jpg", "key": "id"}, "no column 'jpg': did you mean 'jpeg'"),
        ({"column": "label", "key": "id"}, "column 'label' is of type int"),
        ({"column": "jpeg", "key": "ids"}, "no column 'ids': did you mean 'id'"),
        ({"column": "jpeg"}, "choose a key from"),
        ({"key": "id"}, "column is missing: give the name"),
        ({"column": "jpeg", "key": "id", "keep": "labels"}, "no column 'labels'"),
        ({"column": "jpeg", "key": "id", "keep": "Path"}, "keep='Path' is not valid"),
        ({"column": "jpeg", "key": "id", "keep": ["label", "label"]}, "give it once"),
        ({"column": "jpeg", "key": "id", "version": "edition"}, "no column 'edition'"),
        ({"column": "jpeg", "key": "id", "where": "nothing = 1"}, "nothing"),
        ({"column": "jpeg", "key": "id", "where": "1 ="}, "[Ss]yntax error"),
        ({"column": "jpeg", "key": "id", "format": "orc"}, "not for data frames"),
        ({"column": "jpeg", "key": "id", "recursive": True}, "recursive is only for files"),
        ({"column": "jpeg", "key": "split"}, "the key 'train' occurs 3 times"),
        ({"column": "jpeg", "key": "id", "output": "array"}, "output is not an option of extract"),
        ({"column": "jpeg", "key": "id", "where": "label > 9"}, "no images found"),
    ],
)
def test_wrong_options_of_tables(
    run: Extract, table: DataFrame, dest: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ImageVecError, match=said) as raised:
        run(table, **options)
    assert_one_line(raised)
    assert not list(dest.rglob("*.parquet"))


def test_rows_without_a_key(run: Extract, spark: SparkSession) -> None:
    found = [(None, image(0)), (None, image(1)), ("a", image(2))]
    df = spark.createDataFrame(found, "id string, content binary")
    with pytest.raises(OptionError, match="2 of 3 rows have no key: choose another key, or"):
        run(df, column="content", key="id")
    assert run(df, column="content", key="id", where="id IS NOT NULL").features == 1


def test_formats_and_sources_that_do_not_fit(run: Extract, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(image(1))
    for options, said in (
        ({"format": "parkett", "column": "x"}, "parkett"),
        ({"key": "id"}, "key is only for tables: also give column"),
        ({"keep": ["id"]}, "keep is only for tables"),
        ({"format": "webdataset", "key": "id"}, "key is only for sources other than webdataset"),
        ({"format": "parquet", "column": "x"}, "1.png"),
    ):
        with pytest.raises(ImageVecError, match=said) as raised:
            run(tmp_path / "images", **options)
        assert_one_line(raised)


# DEST.


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.png").write_bytes(image(seed))
    return folder


def factory_that_is(edited: bool) -> Callable[[], nn.Module]:
    class Net(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).relu()

    def original() -> nn.Module:
        return Tiny()

    factory = Net if edited else original
    factory.__qualname__ = "factory"
    return factory


def test_features_of_an_edited_factory_are_refused(
    run: Extract, photos: Path, tmp_path: Path
) -> None:
    """With the same name and weights."""
    saved(tiny, tmp_path / "weights.pth")
    options = {"weights": str(tmp_path / "weights.pth"), "layer": "logits"}
    first = run(photos, model=factory_that_is(edited=False), **options)
    assert run(photos, model=factory_that_is(edited=False), **options).fingerprint == (
        first.fingerprint
    )
    code = r"not comparable: code '[0-9a-f]{16}' and '[0-9a-f]{16}' \(digests of.*overwrite=True"
    with pytest.raises(FingerprintError, match=code) as raised:
        run(photos, model=factory_that_is(edited=True), **options)
    assert_one_line(raised)


def test_other_features_are_refused_or_replaced(run: Extract, photos: Path, dest: Path) -> None:
    first = run(photos)
    with pytest.raises(FingerprintError, match=r"normalize .*overwrite=True replaces") as raised:
        run(photos, normalize=True)
    assert_one_line(raised)
    with pytest.raises(OptionError, match="does not exist"):
        run(photos / "nothing", normalize=True, overwrite=True)
    assert len(rows(dest)) == 4
    second = run(photos, normalize=True, overwrite=True)
    assert (second.done_before, second.features) == (0, 4)
    assert first.fingerprint != second.fingerprint


def test_overwrite_keeps_the_old_table_until_the_new_one_is_complete(
    run: Extract, photos: Path, dest: Path
) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    run(photos)
    before = table_files(dest)
    for options, said in (
        ({"pattern": "*.jpg"}, "no images found"),
        ({"pattern": "*.jpg", "recursive": True}, "no images found"),
        ({"normalize": 3}, "normalize"),
    ):
        with pytest.raises(OptionError, match=said):
            run(photos, overwrite=True, **options)
        assert table_files(dest) == before

    def stop(done: int, errors: int, total: int) -> None:
        assert {path for path in dest.glob("*.parquet")} <= before
        if done:
            raise KeyError("of the callback")

    with pytest.raises(KeyError, match="of the callback"):
        run(photos, overwrite=True, normalize=True, progress=stop)
    assert table_files(dest) == before
    assert run(photos).done_before == 5
    (photos / "bad.png").unlink()
    assert run(photos, overwrite=True, normalize=True).features == 4
    assert len(rows(dest)) == 4
    assert not before & set(dest.rglob("*.parquet"))
    assert {path.name for path in dest.iterdir() if path.is_dir()} == set()


def table_files(dest: Path) -> set[Path]:
    """Returns the files of a table, without those that a run is working on."""
    files = {path for path in dest.rglob("*") if path.is_file()}
    return {path for path in files if "_imagevec" not in path.parts}


def test_killed_overwrite_is_continued(run: Extract, photos: Path, dest: Path) -> None:
    run(photos)
    before = table_files(dest)

    def stop(done: int, errors: int, total: int) -> None:
        if done:
            raise KeyError("of the callback")

    with pytest.raises(KeyError, match="of the callback"):
        run(photos, overwrite=True, normalize=True, progress=stop)
    assert table_files(dest) == before
    assert run(photos, overwrite=True, normalize=True).done_before == 4
    done = rows(dest)
    assert len(done) == 4 and not before & table_files(dest)
    with pytest.raises(KeyError, match="of the callback"):
        run(photos, overwrite=True, progress=stop)
    report = run(photos, overwrite=True, layer="logits")
    assert (report.done_before, report.features) == (0, 4)  # other features are computed
    assert not (dest / "_imagevec").exists()


@pytest.mark.parametrize("point", ["first deletion", "all deletions", "first move"])
def test_interrupt_while_changed_rows_are_replaced_loses_no_row(
    run: Extract, photos: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    run(photos)
    (photos / "0.png").write_bytes(image(50))
    (photos / "1.png").unlink()

    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    stop_at(point, interrupt, monkeypatch.setattr)
    with pytest.raises(KeyboardInterrupt):
        run(photos)
    assert len(rows(dest)) == 4  # extract itself completes the replacement
    run(photos)
    done = rows(dest)
    assert done.keys() == {f"file:{photos}/{name}.png" for name in range(4)}
    assert_is_vector_of(done[f"file:{photos}/0.png"], image(50))
    assert not (dest / "_imagevec").exists()


def test_interrupt_while_a_table_is_replaced_completes_the_replacement(
    run: Extract, photos: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos)

    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    stop_at("first deletion", interrupt, monkeypatch.setattr)
    with pytest.raises(KeyboardInterrupt):
        run(photos, overwrite=True, normalize=True)
    assert len(rows(dest)) == 4
    assert run(photos, normalize=True).done_before == 4


def test_failed_read_does_not_discard_what_a_killed_overwrite_has_computed(
    run: Extract, photos: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos)

    def stop(done: int, *_: int) -> None:
        if done:
            raise KeyError("of the callback")

    with pytest.raises(KeyError, match="of the callback"):
        run(photos, overwrite=True, progress=stop)

    def fail(*_: object) -> None:
        raise ReadError("503")

    with monkeypatch.context() as patch, pytest.raises(ReadError):
        patch.setattr(FolderTable, "check", fail)
        run(photos, overwrite=True)
    assert run(photos, overwrite=True).done_before == 4


def test_interrupt_publishes_once_more_at_most() -> None:
    """If that fails, the keys of its parts are taken, and another look would delete the parts."""
    calls: list[str] = []

    def look() -> None:
        calls.append("look")
        raise OSError

    with (
        pytest.raises(KeyboardInterrupt),
        _watching(look, lambda: calls.append("cancel"), seconds=60),
    ):
        raise KeyboardInterrupt
    assert calls == ["cancel", "look"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_store_that_fails_while_rows_are_replaced_loses_no_row(
    run: Extract, photos: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The same process continues at once when the store is back."""
    run(photos)
    (photos / "0.png").write_bytes(image(50))
    for name in ("1.png", "2.png", "3.png"):
        (photos / name).unlink()

    def fail() -> None:
        fail_at(0, monkeypatch.setattr, OSError, is_lasting=True)
        raise OSError("of the test")

    stop_at("first deletion", fail, monkeypatch.setattr)
    with pytest.raises(OSError, match="of the test"):
        run(photos, overwrite=overwrite)
    monkeypatch.undo()
    report = run(photos)
    done = rows(dest)
    assert len(done) == (1 if overwrite else 4)
    assert report.done_before == 1  # its new row was published by the run that failed
    assert_is_vector_of(done[f"file:{photos}/0.png"], image(50))
    assert not (dest / "_imagevec").exists()


def test_source_that_is_empty_now(
    run: Extract, photos: Path, dest: Path, spark: SparkSession
) -> None:
    """As with a table above 10 MB, which is not broadcast: AQE then leaves out the empty side."""
    run(photos)
    spark.conf.set("spark.sql.autoBroadcastJoinThreshold", "-1")
    try:
        with pytest.raises(OptionError, match="no images found"):
            run(photos, pattern="*.jpg")
        (photos / "0.png").write_bytes(image(50))
        assert run(photos).features == 1
    finally:
        spark.conf.unset("spark.sql.autoBroadcastJoinThreshold")
    assert len(rows(dest)) == 4


def test_retry_errors_computes_passing_errors_again(
    run: Extract, spark: SparkSession, tmp_path: Path, dest: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "1.png").write_bytes(image(1))
    paths = [str(tmp_path / name) for name in ("1.png", "2.png", "3.png", "bad.png")]
    df = spark.createDataFrame([(path,) for path in paths], "file string")
    assert run(df, column="file").errors == {"unreadable_path": 2, "unsupported_format": 1}
    (tmp_path / "2.png").write_bytes(image(2))
    assert run(df, column="file").done_before == 4
    report = run(df, column="file", retry_errors=True)
    assert (report.done_before, report.features) == (2, 1)
    assert report.errors == {"unreadable_path": 1}
    assert rows(dest).keys() == {paths[0], paths[1]}
    assert rows(dest / "_errors").keys() == {paths[2], paths[3]}
    assert run(df, column="file").done_before == 4


def test_relative_paths_start_from_the_folder_of_this_process(
    spark: SparkSession, photos: Path, table: DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The JVM keeps the folder in which it was started."""
    monkeypatch.chdir(photos.parent)
    options = {"spark": spark, "engine": "torch", **MODEL}
    assert extract("photos", "made of files", **options).features == 4
    assert len(rows(photos.parent / "made of files")) == 4
    table.write.parquet(str(photos.parent / "table"))
    assert extract("table", "b", column="jpeg", key="id", **options).features == 2
    assert len(rows(photos.parent / "b")) == 2


def test_name_that_is_no_path_is_given_to_its_format_unchanged() -> None:
    given: list[str] = []
    load = SimpleNamespace(load=given.append)
    session: Any = SimpleNamespace(read=SimpleNamespace(format=lambda _: load))
    read_table(session, "user/photos", "huggingface")
    assert given == ["user/photos"]


def test_what_is_no_table_of_features_is_spared(
    run: Extract, spark: SparkSession, photos: Path, dest: Path
) -> None:
    dest.mkdir()
    (dest / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="exists and has no features: choose another DEST"):
        run(photos, overwrite=True)
    assert [path.name for path in dest.iterdir()] == ["mine.txt"]
    (dest / "mine.txt").unlink()
    spark.range(3).write.mode("overwrite").parquet(str(dest))
    before = sorted(dest.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ImageVecError, match="features") as raised:
            run(photos, overwrite=overwrite)
        assert_one_line(raised)
    assert sorted(path for path in dest.rglob("*") if "_imagevec" not in str(path)) == before


def test_a_file_in_its_place(run: Extract, photos: Path, dest: Path) -> None:
    dest.write_text("mine")
    with pytest.raises(ImageVecError) as raised:
        run(photos)
    assert_one_line(raised)
    assert str(dest) in str(raised.value)
    assert dest.read_text() == "mine"


def test_a_place_that_cannot_be_written(spark: SparkSession, photos: Path) -> None:
    """Not by root either."""
    with pytest.raises(ImageVecError, match="/proc/imagevec") as raised:
        extract(photos, "/proc/imagevec", spark=spark, engine="torch", **MODEL)
    assert_one_line(raised)


@pytest.mark.parametrize("dest", ["nothing://bucket/dest", "http://127.0.0.1:1/dest"])
def test_a_store_that_cannot_be_written(spark: SparkSession, photos: Path, dest: str) -> None:
    with pytest.raises(ImageVecError) as raised:
        extract(photos, dest, spark=spark, read_timeout_seconds=1, **MODEL)
    assert_one_line(raised)
    assert dest.partition("://")[0] in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission(run: Extract, photos: Path, dest: Path) -> None:
    dest.mkdir()
    dest.chmod(0o500)
    with pytest.raises(ImageVecError, match="ermission denied") as raised:
        run(photos)
    assert_one_line(raised)
    assert list(dest.iterdir()) == []
    dest.chmod(0o700)


def test_run_of_another_machine(run: Extract, photos: Path, dest: Path) -> None:
    """Refused while its heart beats, and taken over if its process has ended."""
    epoch = dest / "_imagevec" / "epochs" / "0000000000000003"
    epoch.parent.mkdir(parents=True)
    process = subprocess.Popen(["true"])
    process.wait()
    owner: dict[str, Any] = {"run": "0a", "process": process.pid, "start": "1", "user": "somebody"}
    owner |= {"host": socket.gethostname()}
    epoch.write_text(json.dumps({**owner, "place": "another container"}))
    epoch.with_suffix(".beat").write_text(str(time.time()))
    with pytest.raises(ImageVecError, match=f"is in use by process {process.pid} of somebody on "):
        run(photos)
    epoch.write_text(json.dumps({**owner, "place": _place()}))
    assert run(photos).features == 4
    assert not (dest / "_imagevec").exists()


def test_two_runs_at_the_same_time(run: Extract, photos: Path, dest: Path) -> None:
    """The second is refused, and the first one ends well."""
    refused: list[str] = []
    is_asked = threading.Event()

    def progress(done: int, errors: int, total: int) -> None:
        if not is_asked.is_set():
            is_asked.set()
            with pytest.raises(ImageVecError) as raised:
                run(photos)
            refused.append(str(raised.value))

    assert run(photos, progress=progress).features == 4
    (said,) = refused
    assert said.startswith(f"{dest} is in use by process {os.getpid()} of ")
    assert len(rows(dest)) == 4


def test_progress(run: Extract, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    seen: list[tuple[int, int, int]] = []
    run(photos, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (5, 1, 5)
    assert seen == sorted(seen)


def test_a_callback_that_fails_ends_the_run(run: Extract, photos: Path, dest: Path) -> None:
    def fail(done: int, errors: int, total: int) -> None:
        raise KeyError("of the callback")

    with pytest.raises(KeyError, match="of the callback"):
        run(photos, progress=fail)
    done = len(rows(dest)) if list(dest.glob("*.parquet")) else 0
    assert run(photos).features == 4 - done
    assert len(rows(dest)) == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full(spark: SparkSession, small_disk: Path) -> None:
    blobs = [(f"{n}", image(n), os.urandom(300_000)) for n in range(12)]
    df = spark.createDataFrame(blobs, "id string, content binary, blob binary").repartition(6)
    options = {"engine": "torch", "column": "content", "key": "id", "keep": "blob", **MODEL}
    dest = small_disk / "dest"
    with pytest.raises(ImageVecError, match="No space left on device") as raised:
        extract(df, dest, spark=spark, **options)
    assert_one_line(raised)
    done = len(rows(dest)) if list(dest.glob("*.parquet")) else 0
    assert done < 12
    remount = ["mount", "-o", "remount,size=64m", str(small_disk)]
    subprocess.run(remount, check=True)
    report = extract(df, dest, spark=spark, **options)
    assert (report.done_before, report.features) == (done, 12 - done)
    assert len(rows(dest)) == 12
    assert not (dest / "_imagevec").exists()
