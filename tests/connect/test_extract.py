"""``extract`` in a Spark Connect session."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch
from pyspark.sql import DataFrame, SparkSession
from torch import nn

from imagevec import (
    ExtractReport,
    FingerprintError,
    ImageVectorizer,
    OptionError,
    extract,
    provenance,
)
from imagevec.table import sources
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import encode, photo

MODEL: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
BOX = {"left": 3, "top": 2, "width": 20, "height": 16}
OUTSIDE = {**BOX, "left": 300}

Extract = Callable[..., ExtractReport]


class Slow(nn.Module):
    """Tiny's features, each after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if bool(images.isfinite().all()):  # no tracer takes this model
            time.sleep(0.2)
        logits: torch.Tensor = self.tiny(images)
        return logits


def slow() -> nn.Module:
    return Slow()


SLOW: dict[str, Any] = {**MODEL, "model": slow, "batch_size": 1}


def image(seed: int) -> bytes:
    return encode(photo(40, 30, seed=seed))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images, some in a subfolder, and a file that is not an image."""
    folder = tmp_path / "photos ü"
    (folder / "sub").mkdir(parents=True)
    for seed in range(12):
        name = f"{seed}.png" if seed % 3 else f"sub/{seed} #.png"
        (folder / name).write_bytes(image(seed))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "dest"


@pytest.fixture
def run(spark: SparkSession, dest: Path) -> Extract:
    """Extracts features of a source into ``dest``."""

    def extract_to_dest(src: Any, **options: Any) -> ExtractReport:
        return extract(src, dest, spark=spark, **{**MODEL, **options})

    return extract_to_dest


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks have two files each."""
    monkeypatch.setattr(sources, "_TASK_BYTES", 2 * sources._LEAST_BYTES)


def all_rows(folder: Path) -> list[dict[str, Any]]:
    found = ds.dataset(folder, format="parquet", ignore_prefixes=["_", "."])
    rows: list[dict[str, Any]] = found.to_table().to_pylist() if found.files else []
    return rows


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of a table by path, each of which is there once."""
    found = all_rows(folder)
    by_path = {row["path"]: row for row in found}
    assert len(by_path) == len(found)
    return by_path


def assert_equal(vector: list[float], data: bytes, options: dict[str, Any] = MODEL) -> None:
    """The vector is the one that is computed without Spark."""
    expected = ImageVectorizer(**options).extract_features(data)
    assert vector == pytest.approx(expected, rel=1e-4, abs=1e-6)


def assert_are_vectors_of_files(dest: Path, photos: Path) -> None:
    found = rows(dest)
    good = {f"file:{path}": path for path in photos.rglob("*.png") if path.name != "bad.png"}
    assert found.keys() == good.keys()
    for path, file in good.items():
        assert_equal(found[path]["features"], file.read_bytes())
    assert rows(dest / "_errors").keys() == {f"file:{photos}/bad.png"}
    assert not (dest / "_imagevec").exists()


def test_files(run: Extract, spark: SparkSession, photos: Path, dest: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    report = run(photos, recursive=True, progress=lambda *counts: calls.append(counts))
    assert report == ExtractReport(
        found=13,
        done_before=0,
        features=12,
        errors={"unsupported_format": 1},
        nulls=0,
        skipped={},
        seconds=report.seconds,
        fingerprint=ImageVectorizer(**MODEL).spec.fingerprint,
        dest=str(dest),
    )
    assert calls == sorted(calls)
    assert calls[-1] == (13, 1, 13)
    assert_are_vectors_of_files(dest, photos)
    (error,) = rows(dest / "_errors").values()
    assert error["error"].startswith("unsupported_format:")
    table = spark.read.parquet(str(dest))
    assert table.count() == 12
    assert provenance(table).fingerprint == report.fingerprint


def test_a_second_run_computes_what_is_new_or_changed(
    run: Extract, photos: Path, dest: Path
) -> None:
    run(photos, recursive=True)
    again = run(photos, recursive=True)
    assert (again.found, again.done_before, again.features, again.errors) == (13, 13, 0, {})
    (photos / "new.png").write_bytes(image(20))
    (photos / "1.png").write_bytes(image(21) + b"longer")
    kept_up = run(photos, recursive=True)
    assert (kept_up.found, kept_up.done_before, kept_up.features) == (14, 12, 2)
    assert_are_vectors_of_files(dest, photos)


def test_a_pattern_of_names_without_subfolders(run: Extract, photos: Path, dest: Path) -> None:
    report = run(photos, pattern="1*.png")
    assert (report.found, report.features, report.skipped) == (3, 3, {"subfolder": 1})
    assert rows(dest).keys() == {f"file:{photos}/{name}.png" for name in ("1", "10", "11")}


@pytest.fixture
def table(spark: SparkSession) -> DataFrame:
    images = [*map(image, range(5)), b"no image", None]
    boxes = [[BOX, OUTSIDE], [BOX], [], [BOX, BOX], None, [BOX], [BOX]]
    records = [(f"k{n}", content, boxes[n], n) for n, content in enumerate(images)]
    box = "struct<left: int, top: int, width: int, height: int>"
    schema = f"id string, content binary, boxes array<{box}>, `a.b` int"
    return spark.createDataFrame(records, schema).repartition(3)


def test_a_data_frame(run: Extract, table: DataFrame, dest: Path) -> None:
    options: dict[str, Any] = {"column": "content", "key": "id", "keep": "a.b"}
    report = run(table, **options)
    assert (report.found, report.features, report.nulls) == (7, 5, 1)
    assert report.errors == {"unsupported_format": 1}
    found = rows(dest)
    assert {path: row["a.b"] for path, row in found.items()} == {f"k{n}": n for n in range(5)}
    for seed in range(5):
        assert_equal(found[f"k{seed}"]["features"], image(seed))
    assert run(table, **options).done_before == 7


def test_a_parquet_table(run: Extract, table: DataFrame, tmp_path: Path, dest: Path) -> None:
    source = tmp_path / "source"
    table.write.parquet(str(source))
    report = run(source, column="content", key="id", where="id < 'k3'")
    assert (report.found, report.features) == (3, 3)
    assert rows(dest).keys() == {"k0", "k1", "k2"}


def test_boxes(run: Extract, table: DataFrame, dest: Path) -> None:
    options: dict[str, Any] = {"column": "content", "key": "id", "boxes": "boxes"}
    report = run(table, **options)
    assert (report.found, report.features) == (7, 4)
    found = {(row["path"], row["box_number"]): row for row in all_rows(dest)}
    assert found.keys() == {("k0", 0), ("k1", 0), ("k3", 0), ("k3", 1)}
    for (path, _), row in found.items():
        assert row["box"] == BOX
        crop = photo(40, 30, seed=int(path[1:])).crop((3, 2, 23, 18))
        assert_equal(row["features"], encode(crop))
    errors = {(row["path"], row["box_number"]) for row in all_rows(dest / "_errors")}
    assert ("k0", 1) in errors
    assert {path for path, _ in errors} == {"k0", "k2", "k4", "k5", "k6"}
    assert run(table, **options).done_before == 7


def test_overwrite(run: Extract, photos: Path, dest: Path) -> None:
    first = run(photos, recursive=True)
    with pytest.raises(FingerprintError, match="overwrite=True"):
        run(photos, recursive=True, normalize=True)
    assert_are_vectors_of_files(dest, photos)
    report = run(photos, recursive=True, normalize=True, overwrite=True)
    assert (report.done_before, report.features) == (0, 12)
    assert report.fingerprint != first.fingerprint
    row = rows(dest)[f"file:{photos}/1.png"]
    assert_equal(row["features"], image(1), {**MODEL, "normalize": True})
    assert not (dest / "_imagevec").exists()


def test_options_are_checked(run: Extract, table: DataFrame, photos: Path, dest: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'content'"):
        run(table, column="contents", key="id")
    with pytest.raises(OptionError, match="DEST is inside SRC"):
        run(dest.parent, recursive=True)
    with pytest.raises(OptionError, match="nothing does not exist"):
        run(photos / "nothing")
    assert not dest.exists()


class CallbackError(Exception):
    pass


@pytest.fixture
def interrupted(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that the server has interrupted: PySpark itself asks for it after Ctrl-C."""
    operations: list[str] = []
    client: Any = spark.client

    def recorded(interrupt: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
        def call(name: str) -> list[str]:
            found = interrupt(name)
            operations.extend(found)
            return found

        return call

    for name in ("interrupt_tag", "interrupt_operation"):
        monkeypatch.setattr(client, name, recorded(getattr(client, name)))
    return operations


def fail(done: int, *_: int) -> None:
    if done:  # the first call comes before the job
        raise CallbackError


def press_ctrl_c(done: int, *_: int) -> None:
    if done:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize(
    ("progress", "error"), [(fail, CallbackError), (press_ctrl_c, KeyboardInterrupt)]
)
def test_a_run_that_stops_cancels_its_job_and_is_continued(
    run: Extract,
    photos: Path,
    dest: Path,
    interrupted: list[str],
    progress: Callable[..., None],
    error: type[BaseException],
) -> None:
    for seed in range(12, 40):
        (photos / f"{seed}.png").write_bytes(image(seed))
    with pytest.raises(error):
        run(photos, recursive=True, progress=progress, **SLOW)
    assert interrupted
    done = len(rows(dest)) + len(rows(dest / "_errors") if (dest / "_errors").exists() else ())
    assert 0 < done < 41
    report = run(photos, recursive=True, **SLOW)
    assert (report.found, report.done_before) == (41, done)
    # What late tasks of the first run have written meanwhile is deleted by the next run.
    assert run(photos, recursive=True, **SLOW).done_before == 41
    assert_are_vectors_of_files(dest, photos)
