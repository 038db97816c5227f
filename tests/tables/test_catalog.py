"""``extract`` to tables of a catalog: Delta and Iceberg."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from imagevec import FingerprintError, ImageVecError, OptionError, extract, nearest, provenance
from imagevec.storage.folder import Folder
from imagevec.table import catalog, fence
from imagevec.table.catalog import PROPERTY, CatalogTable
from imagevec.table.fence import Owner
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.table.test_webdataset import write_shard
from tests.tables.conftest import SETTINGS, Extract


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


def change(photos: Path) -> None:
    """Changes a photo, breaks one, repairs the bad one, and adds one."""
    touch(photos / "c.png", image(7))
    touch(photos / "d.png", b"no image any more")
    touch(photos / "bad.png", image(8))
    (photos / "new.png").write_bytes(image(9))


CHANGED = {"a b.png", "it's.png", "c.png", "bad.png", "new.png"}, {"d.png"}


def test_changed_new_and_bad_images(
    run: Extract, spark: SparkSession, photos: Path, name: str
) -> None:
    run(photos)
    before = rows(spark, name)
    change(photos)
    report = run(photos)
    assert (report.done_before, report.features, report.errors) == (
        2,
        3,
        {"unsupported_format": 1},
    )
    assert names(spark, name) == CHANGED
    after = rows(spark, name)
    assert after["a b.png"] == before["a b.png"]
    assert after["c.png"].features != before["c.png"].features


STEPS = {
    "before the first commit": ("_merge", 1, "before"),
    "after the first commit": ("_merge", 1, "after"),
    "between the commits": ("_merge", 2, "before"),
    "before the acknowledgement": ("_merge", 2, "after"),
}


class StoppedError(BaseException):
    """What a test raises instead of SIGKILL."""


def stop_at(patch: pytest.MonkeyPatch, method_name: str, number: int, when: str) -> None:
    """Stops a run at its ``number``-th call of a method, from 1. Then it can change nothing."""
    method = getattr(CatalogTable, method_name)
    calls = 0

    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError

    def stop() -> None:
        for changing in ("move", "delete", "write", "create", "delete_empty"):
            patch.setattr(Folder, changing, stopped)
        patch.setattr(CatalogTable, method_name, stopped)
        stopped()

    def watched(self: CatalogTable, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            stop()
        method(self, *arguments)
        if calls == number:
            stop()

    patch.setattr(CatalogTable, method_name, watched)
    # This process lives on: the next run must not wait for its heartbeats.
    patch.setattr(fence, "_this_process", lambda run: of_dead_process(run))


def of_dead_process(run: str) -> bytes:
    owner = Owner(run, "host", fence._place(), 2**22 + 1, "", "user")
    return json.dumps(dataclasses.asdict(owner)).encode()


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
    change(photos)
    with monkeypatch.context() as patch:
        stop_at(patch, *STEPS[step])
        with pytest.raises(StoppedError):
            run(photos)
    report = run(photos)
    assert (report.done_before, report.features) == (6, 0)  # it has merged the parts of the first
    assert names(spark, name) == CHANGED


def test_first_wave_is_merged_after_a_stop(
    run: Extract, spark: SparkSession, photos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "_merge", 1, "before")
        with pytest.raises(StoppedError):
            run(photos)
    assert spark.read.table(name).count() == 0
    assert run(photos).done_before == 5
    assert names(spark, name) == (GOOD, {"bad.png"})


def test_parts_of_a_dropped_table_are_not_used(
    run: Extract, spark: SparkSession, photos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "_merge", 1, "before")
        with pytest.raises(StoppedError):
            run(photos)
    spark.sql(f"DROP TABLE {name}")
    assert run(photos, layer="logits").features == 4
    assert {len(row.features) for row in rows(spark, name).values()} == {5}


def test_acknowledgement_that_stops_halfway(
    run: Extract, spark: SparkSession, photos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part has two files: the second one must not be taken for a part without errors."""
    with monkeypatch.context() as patch:
        moves = 0
        move = Folder.move

        def moved_once(self: Folder, source: str, target: str) -> bool:
            nonlocal moves
            moves += 1
            if moves > 1:
                raise StoppedError
            return move(self, source, target)

        patch.setattr(Folder, "move", moved_once)
        patch.setattr(fence, "_this_process", lambda run: of_dead_process(run))
        with pytest.raises(StoppedError):
            run(photos)
    assert run(photos).done_before == 5
    assert names(spark, name) == (GOOD, {"bad.png"})


# Other writers.


def test_merge_is_repeated_if_another_writer_commits(
    run: Extract,
    spark: SparkSession,
    photos: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(photos)
    (photos / "new.png").write_bytes(image(9))
    started, written = str(tmp_path / "started"), str(tmp_path / "written")
    run_merge, tries = CatalogTable._run_merge, 0

    def wait(batches: Iterator[Any]) -> Iterator[Any]:
        Path(started).touch()
        while not Path(written).exists():
            time.sleep(0.1)
        yield from batches

    def write() -> None:
        while not Path(started).exists():
            time.sleep(0.1)
        spark.sql(f"INSERT INTO {name} (path, version) VALUES ('another', '1')")
        Path(written).touch()

    def slow(self: CatalogTable, kind: str, run: str, source: DataFrame, clauses: str) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            source = source.coalesce(1).mapInArrow(wait, source.schema)
        run_merge(self, kind, run, source, clauses)

    monkeypatch.setattr(CatalogTable, "_run_merge", slow)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert run(photos).features == 1
    finally:
        Path(started).touch()
        writer.join()
    assert tries == 2
    assert set(rows(spark, name)) == {*GOOD, "new.png", "another"}


def test_writers_that_always_conflict(
    run: Extract, photos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conflict(*_: Any) -> None:
        raise RuntimeError("org.apache.iceberg.exceptions.ValidationException: Found conflicting")

    with monkeypatch.context() as patch:
        patch.setattr(CatalogTable, "_run_merge", conflict)
        patch.setattr(catalog, "_RETRY_SECONDS", 0.0)
        with pytest.raises(ImageVecError, match=f"{name}.*run extract again"):
            run(photos)
    assert run(photos).done_before == 5


def test_second_driver_is_refused(
    run: Extract, spark: SparkSession, photos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, refused = CatalogTable.publish, []

    def publish_twice(self: CatalogTable, *arguments: Any) -> None:
        with pytest.raises(ImageVecError, match=f"{name} is in use by process") as raised:
            run(photos)
        refused.append(raised.value)
        publish(self, *arguments)

    monkeypatch.setattr(CatalogTable, "publish", publish_twice)
    assert run(photos).features == 4
    assert refused
    assert names(spark, name) == (GOOD, {"bad.png"})


def test_fenced_driver_stops(
    run: Extract,
    spark: SparkSession,
    photos: Path,
    name: str,
    staging: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = CatalogTable.check

    def check_and_be_fenced(self: CatalogTable, *arguments: Any) -> None:
        check(self, *arguments)
        (epoch,) = [path for path in staging.rglob("epochs/*") if not path.suffix]
        later = epoch.with_name(f"{int(epoch.name) + 1:0{len(epoch.name)}}")
        later.write_bytes(of_dead_process("f00"))

    with monkeypatch.context() as patch:
        patch.setattr(CatalogTable, "check", check_and_be_fenced)
        with pytest.raises(ImageVecError, match=f"another run took over {name}"):
            run(photos)
    assert spark.read.table(name).count() == 0
    assert run(photos).found == 5
    assert names(spark, name) == (GOOD, {"bad.png"})


# Replacing.


def test_overwrite(
    run: Extract, spark: SparkSession, photos: Path, name: str, provider: str
) -> None:
    run(photos)
    with pytest.raises(FingerprintError, match=f"{name}.*layer.*overwrite=True"):
        run(photos, layer="logits")
    (photos / "bad.png").write_bytes(image(8))
    report = run(photos, layer="logits", overwrite=True)
    assert (report.done_before, report.features) == (0, 5)
    assert names(spark, name) == ({*GOOD, "bad.png"}, set())
    assert provenance(spark.read.table(name)).layer == "logits"
    assert provider_of(spark, name) == provider_of(spark, f"{name}_errors") == provider
    assert run(photos, layer="logits").done_before == 5


@pytest.mark.parametrize("number", [1, 2])
def test_next_run_completes_a_replacement(
    run: Extract,
    spark: SparkSession,
    photos: Path,
    name: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(photos)
    (photos / "bad.png").unlink()
    with monkeypatch.context() as patch:
        stop_at(patch, "_retried", number, "before")
        with pytest.raises(StoppedError):
            run(photos, layer="logits", overwrite=True)
    assert run(photos, layer="logits").done_before == 4
    assert names(spark, name) == (GOOD, set())


def test_new_table_with_overwrite(
    run: Extract, spark: SparkSession, photos: Path, name: str
) -> None:
    assert run(photos, overwrite=True).features == 4
    assert names(spark, name) == (GOOD, {"bad.png"})
    assert run(photos).done_before == 5


# Columns.


def test_kept_columns(run: Extract, spark: SparkSession, name: str) -> None:
    data = [("a", image(1), 1, "x", [1]), ("b", image(2), 2, "y", None), ("c", None, 3, "z", [])]
    type = "id string, image binary, label smallint, `o``dd` string, more array<tinyint>"
    df = spark.createDataFrame(data, type)
    given: dict[str, Any] = {"column": "image", "key": "id", "keep": ["label", "o`dd", "more"]}
    report = run(df, **given)
    assert (report.features, report.nulls) == (2, 1)
    there = rows(spark, name)
    assert [(row.label, row["o`dd"], row.more) for _, row in sorted(there.items())] == [
        (1, "x", [1]),
        (2, "y", None),
    ]
    assert run(df, **given).done_before == 3
    with pytest.raises(OptionError, match=f"{name} has the columns .*keep the same columns"):
        run(df, column="image", key="id")
    with pytest.raises(OptionError, match=f"{name} has the column 'label' of type"):
        run(df.withColumn("label", F.lit("text")), **given)


BOX = "struct<left: int, top: int, width: int, height: int, label: string>"


def test_boxes(run: Extract, spark: SparkSession, name: str) -> None:
    good, other, bad = (0, 0, 9, 9, "good"), (5, 5, 9, 9, "other"), (99, 99, 9, 9, "bad")
    type = f"id string, image binary, boxes array<{BOX}>"

    def extracted(**boxes: list[Any] | None) -> list[tuple[str, int | None, str | None, str]]:
        data = [(key, image(1), value) for key, value in boxes.items()]
        run(spark.createDataFrame(data, type), column="image", key="id", boxes="boxes")
        assert run(
            spark.createDataFrame(data, type), column="image", key="id", boxes="boxes"
        ).done_before == len(data)
        found = []
        for kind, suffix in (("features", ""), ("error", "_errors")):
            found += [
                (row.path, row.box_number, row.box and row.box.label, kind)
                for row in spark.read.table(name + suffix).collect()
            ]
        return sorted(found, key=str)

    assert extracted(a=[good, bad, other], b=[], c=[good]) == [
        ("a", 0, "good", "features"),
        ("a", 1, "bad", "error"),
        ("a", 2, "other", "features"),
        ("b", None, None, "error"),
        ("c", 0, "good", "features"),
    ]
    assert extracted(a=[bad, other], b=[good], c=[]) == [
        ("a", 0, "bad", "error"),
        ("a", 1, "other", "features"),
        ("b", 0, "good", "features"),
        ("c", None, None, "error"),
    ]


def test_several_layers(run: Extract, spark: SparkSession, photos: Path, name: str) -> None:
    layers = ["pooled", "logits"]
    run(photos, layer=layers)
    row = rows(spark, name)["c.png"]
    assert (len(row.features.pooled), len(row.features.logits)) == (8, 5)
    assert provenance(spark.read.table(name)).layer == ("pooled", "logits")
    touch(photos / "c.png", image(7))
    assert run(photos, layer=layers).features == 1
    assert rows(spark, name)["c.png"].features != row.features


def test_retry_errors(run: Extract, spark: SparkSession, tmp_path: Path, name: str) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    df = spark.createDataFrame([(path,) for path in paths], "path string")
    assert run(df, column="path").errors == {"unreadable_path": 3}
    Path(paths[0]).write_bytes(image(0))
    Path(paths[1]).write_bytes(b"no image")
    assert run(df, column="path").done_before == 3
    report = run(df, column="path", retry_errors=True)
    assert report.errors == {"unsupported_format": 1, "unreadable_path": 1}
    assert set(rows(spark, name)) == {"0.png"}
    codes = {path: row.error.split(":")[0] for path, row in rows(spark, f"{name}_errors").items()}
    assert codes == {"1.png": "unsupported_format", "2.png": "unreadable_path"}


def test_repaired_shard(run: Extract, spark: SparkSession, tmp_path: Path, name: str) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    whole = write_shard(
        shards / "a.tar", [{"__key__": key, "png": image(0)} for key in ("x", "y")]
    ).read_bytes()
    (shards / "a.tar").write_bytes(whole[:1000])
    report = run(shards, format="webdataset")
    assert (report.features, len(rows(spark, f"{name}_errors"))) == (0, 1)
    touch(shards / "a.tar", whole)
    assert run(shards, format="webdataset").features == 2
    assert names(spark, name) == ({"x", "y"}, set())


# Provenance.


def test_provenance(run: Extract, spark: SparkSession, photos: Path, name: str) -> None:
    report = run(photos)
    there = spark.read.table(name)
    assert provenance(there).fingerprint == report.fingerprint
    assert provenance(there.where("width > 1").select("path", "features")).model.endswith("tiny")
    properties = {row.key: row.value for row in spark.sql(f"SHOW TBLPROPERTIES {name}").collect()}
    assert json.loads(properties[PROPERTY])["imagevec"]["fingerprint"] == report.fingerprint


def test_nearest(
    run: Extract, spark: SparkSession, photos: Path, name: str, tmp_path: Path
) -> None:
    run(photos)
    there = spark.read.table(name)
    assert nearest(there, there, k=1).count() == 4
    given: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
    extract(photos, tmp_path / "logits", spark=spark, layer="logits", **given)
    with pytest.raises(FingerprintError, match="layer"):
        nearest(there, spark.read.parquet(str(tmp_path / "logits")), k=1)


@pytest.fixture
def settings(tmp_path: Path, spark: SparkSession) -> Path:
    """A folder with the settings of the session, for commands in processes of their own."""
    names = [*SETTINGS, "spark.sql.catalog.local.warehouse"]
    lines = [f"{name} {spark.conf.get(name)}" for name in names if spark.conf.get(name, None)]
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "spark-defaults.conf").write_text("\n".join(lines))
    return folder


def test_commands(
    run: Extract, spark: SparkSession, photos: Path, tmp_path: Path, name: str, settings: Path
) -> None:
    """They read neither deleted rows nor files of old versions."""
    run(photos)
    (photos / "c.png").write_bytes(image(0))
    run(photos)
    if name.startswith("local."):
        source = [name, "--format", "table"]
    else:
        location = spark.sql(f"DESCRIBE DETAIL {name}").first()
        assert location is not None
        source = [location["location"].removeprefix("file:"), "--format", "delta"]

    def command(verb: str, *arguments: str) -> dict[str, Any]:
        words = [sys.executable, "-W", "ignore", "-m", "imagevec", verb, *source, *arguments]
        environment = {**os.environ, "SPARK_CONF_DIR": str(settings)}
        environment.pop("SPARK_REMOTE", None)
        done = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    query = str(photos / "a b.png")
    [found] = command("similar", "--query", query, "-k", "9")["queries"]
    neighbours = sorted(neighbour["path"] for neighbour in found["neighbours"])
    assert neighbours == sorted(f"file:{photos}/{name}" for name in GOOD - {"a b.png"})
    page = tmp_path / "page.html"
    assert command("gallery", "--out", str(page))["images"] == 4
    assert "tiny, random weights" in page.read_text()  # the provenance is there, too
    groups = command("duplicates", "--out", str(tmp_path / "groups"), "--min-cosine", "0.99999")
    assert groups["images"] == 2


# What is refused.


def refused(spark: SparkSession, photos: Path, name: str, staging: Path) -> str:
    with pytest.raises(OptionError) as raised:
        extract(photos, name, to="table", staging=staging, spark=spark, model="resnet5000")
    return str(raised.value)


def test_table_without_merge_is_refused(spark: SparkSession, photos: Path, staging: Path) -> None:
    spark.sql("CREATE TABLE IF NOT EXISTS plain (path string) USING parquet")
    assert "plain is a table of parquet, which has no MERGE" in refused(
        spark, photos, "plain", staging
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_new_table_without_merge_is_refused(
    spark: SparkSession, photos: Path, staging: Path, overwrite: bool
) -> None:
    default = str(spark.conf.get("spark.sql.sources.default"))
    spark.conf.set("spark.sql.sources.default", "parquet")
    given: dict[str, Any] = {"model": tiny, "weights": "random", "overwrite": overwrite}
    try:
        with pytest.raises(OptionError, match=r"t1 would be a table of parquet.*sources\.default"):
            extract(photos, "t1", to="table", staging=staging, spark=spark, **given)
    finally:
        spark.conf.set("spark.sql.sources.default", default)
    assert not spark.catalog.tableExists("t1")


def test_other_data_is_refused(
    spark: SparkSession, photos: Path, staging: Path, name: str, provider: str
) -> None:
    spark.sql(f"CREATE TABLE {name} (path string) USING {provider}")
    assert f"{name} exists and has no features" in refused(spark, photos, name, staging)
    spark.sql(f"DROP TABLE {name}")
    spark.sql(f"CREATE TABLE {name}_errors (path string) USING {provider}")
    assert "_errors` exists and has no features" in refused(spark, photos, name, staging)


def test_staging_that_cannot_be_written(run: Extract, staging: Path, photos: Path) -> None:
    staging.write_bytes(b"a file")
    with pytest.raises((ImageVecError, OSError), match="staging"):
        run(photos)


def test_staging_that_spark_cannot_read(spark: SparkSession, photos: Path, name: str) -> None:
    with pytest.raises(OptionError, match="Spark cannot read the files in staging, memory://s"):
        extract(photos, name, to="table", staging="memory://s", spark=spark, model=tiny)
    assert not spark.catalog.tableExists(name)


def test_table_of_a_run_that_was_killed_before_it_is_replaced(
    run: Extract, spark: SparkSession, photos: Path, name: str, provider: str
) -> None:
    properties = f"TBLPROPERTIES ('{PROPERTY}' = '{{}}')"
    spark.sql(f"CREATE TABLE {name} (path string) USING {provider} {properties}")
    assert run(photos).features == 4


@pytest.mark.parametrize("name", ["", "a..b", "photos/features", "s3://bucket/x", "`a", "a b"])
def test_malformed_names_are_refused(
    spark: SparkSession, photos: Path, staging: Path, name: str
) -> None:
    assert "is not the name of a table" in refused(spark, photos, name, staging)


def test_staging_is_for_tables_only(spark: SparkSession, photos: Path, tmp_path: Path) -> None:
    for given, said in (
        ({"to": "table"}, "requires staging"),
        ({"staging": tmp_path}, "staging is only for to='table'"),
        ({"to": "delta"}, "choose 'folder' or 'table'"),
    ):
        with pytest.raises(OptionError, match=said):
            extract(photos, "t", spark=spark, **given)


@pytest.mark.parametrize("last", ["`it-is`", "`a``b`", "`ü-1`"])
def test_quoted_names(spark: SparkSession, photos: Path, staging: Path, last: str) -> None:
    given: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
    name = f"local.db.{last}"
    extract(photos, name, to="table", staging=staging, spark=spark, **given)
    assert spark.read.table(name).count() == 4
    assert spark.read.table(f"{name[:-1]}_errors`").count() == 1


def test_two_tables_share_a_staging_folder(spark: SparkSession, staging: Path) -> None:
    folder = Folder(staging)
    names = ["t", "spark_catalog.default.t", "default.t", "`spark_catalog`.`default`.`t`"]
    (work,) = {CatalogTable(spark, name, folder).work.path for name in names}
    assert Path(work).parent == staging
    others = ["local.db.t", "spark_catalog.default.`t.`", "`spark_catalog.default`.t", "t_"]
    paths = {CatalogTable(spark, name, folder).work.path for name in others}
    assert len({work, *paths}) == 1 + len(others)
