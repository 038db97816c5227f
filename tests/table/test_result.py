"""The table that ``extract`` writes, read by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet
from pyspark.sql import SparkSession

from imagevec import ImageVecError, extract, provenance
from imagevec.storage.folder import Folder
from imagevec.table import parts
from imagevec.table.parts import Task, open_run, write_parts
from imagevec.table.schema import CHANGED, IMAGE, SOURCE_ERROR
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import vector_of

OPTIONS: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
COLUMNS = [
    "path",
    "length",
    "modificationTime",
    "version",
    "features",
    "width",
    "height",
    "truncated",
    "error",
]

Vectors = dict[str, list[float]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(6):
        (folder / f"{seed}.png").write_bytes(encode(photo(30 + seed, 20, seed=seed)))
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "empty.png").touch()
    return folder


@pytest.fixture(scope="module")
def dest(spark: SparkSession, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dest") / "run=1" / "a {b} [c] %20"
    report = extract(images, folder, spark=spark, **OPTIONS)
    assert (report.features, report.errors) == (6, {"empty": 1, "unsupported_format": 1})
    return folder


@pytest.fixture(scope="module")
def expected(images: Path) -> Vectors:
    model = {"model": tiny, "weights": "random"}
    return {f"file:{path}": vector_of(path.read_bytes(), **model) for path in images.glob("?.png")}


def assert_same(found: Vectors, expected: Vectors) -> None:
    assert found.keys() == expected.keys()
    for path, vector in found.items():
        np.testing.assert_allclose(vector, expected[path], rtol=1e-4, atol=1e-6)
        assert np.asarray(vector).dtype in (np.float32, np.float64)


def by_pandas(dest: Path) -> Vectors:
    table = pd.concat(pd.read_parquet(file) for file in dest.glob("*.parquet"))
    assert list(table.columns) == COLUMNS
    return dict(zip(table["path"], table["features"], strict=True))


def by_polars(dest: Path) -> Vectors:
    polars = pytest.importorskip("polars")
    table = polars.concat(
        [polars.read_parquet(file, glob=False) for file in dest.glob("*.parquet")]
    )
    assert table.columns == COLUMNS
    return dict(zip(table["path"], table["features"].to_list(), strict=True))


def by_duckdb(dest: Path) -> Vectors:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        files = [str(file) for file in plain(dest).glob("*.parquet")]
        found = connection.execute("SELECT path, features FROM read_parquet(?)", [files])
        return dict(found.fetchall())


def by_lance(dest: Path) -> Vectors:
    lance = pytest.importorskip("lance")
    files = [str(file) for file in dest.glob("*.parquet")]
    copy = lance.write_dataset(dataset.dataset(files), dest.parent / "copy.lance", mode="overwrite")
    table = copy.to_table(columns=["path", "features"]).to_pydict()
    return dict(zip(table["path"], table["features"], strict=True))


def plain(dest: Path) -> Path:
    """The same place without what DuckDB takes for a glob."""
    link = dest.parent / "plain"
    if not link.exists():
        link.symlink_to(dest)
    return link


@pytest.mark.parametrize("read", [by_pandas, by_polars, by_duckdb, by_lance])
def test_who_else_reads_it(dest: Path, expected: Vectors, read: Callable[[Path], Vectors]) -> None:
    assert_same(read(dest), expected)


def test_spark_reads_it(spark: SparkSession, dest: Path, expected: Vectors) -> None:
    features = spark.read.parquet(str(plain(dest)))
    assert features.columns == COLUMNS
    rows = features.collect()
    assert_same({row.path: row.features for row in rows}, expected)
    assert provenance(features).model.endswith("tiny")
    assert {row.error for row in rows} == {None}
    by_path = {Path(row.path).name: row for row in rows}
    assert (by_path["3.png"].width, by_path["3.png"].height) == (33, 20)
    status = Path(by_path["3.png"].path.removeprefix("file:")).stat()
    assert by_path["3.png"].length == status.st_size
    assert by_path["3.png"].version == f"{status.st_size}:{status.st_mtime_ns // 1000}"


def test_errors_have_the_same_columns(spark: SparkSession, dest: Path) -> None:
    errors = spark.read.parquet(str(plain(dest) / "_errors"))
    features = spark.read.parquet(str(plain(dest)))
    assert errors.schema == features.schema
    rows = {Path(row.path).name: row for row in errors.collect()}
    assert rows["empty.png"].error.startswith("empty:") and rows["empty.png"].length == 0
    assert rows["bad.png"].error.startswith("unsupported_format:")
    assert all(row.features is None and row.width is None for row in rows.values())


def test_parts_are_no_larger_than_64_mb(tmp_path: Path) -> None:
    """Of features that fill three of them, and cannot be compressed."""
    rows, size = 40_000, 1024
    task = Task(Folder(tmp_path), "0a", (), {}, None, (), "snappy", 0.0)
    nulls = {name: pa.nulls(rows, type) for name, type in SOURCE_TYPES.items()}
    columns = {**nulls, "path": [str(row) for row in range(rows)], CHANGED: [False] * rows}
    batches = pa.table({IMAGE: pa.nulls(rows, pa.binary()), **columns}).to_batches(1_000)

    def extract(batches: Iterator[Any]) -> Iterator[pd.DataFrame]:
        rng = np.random.default_rng(0)
        for batch in batches:
            vectors = list(rng.random((len(batch), size), np.float32))
            same = {"width": 1, "height": 1, "truncated": False, "error": None}
            yield pd.DataFrame({"features": vectors, **same})

    open_run(task)
    assert write_parts(batches, task, 0, 0, extract) == rows
    sizes = [path.stat().st_size for path in tmp_path.glob("*.parquet")]
    assert sum(sizes) > 150 << 20
    assert max(sizes) <= 70 << 20  # one batch more
    groups = [parquet.ParquetFile(path).num_row_groups for path in tmp_path.glob("*.parquet")]
    assert set(groups) == {1}


def test_parts_are_written_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon at first, and then before a minute has passed. A forward pass takes 3 s."""
    now, rows = 0.0, 200
    clock = SimpleNamespace(monotonic=lambda: now, time=lambda: now)
    monkeypatch.setattr(parts, "time", clock)
    task = Task(Folder(tmp_path), "0a", (), {}, None, (), "snappy", 0.0)
    nulls = {name: pa.nulls(rows, type) for name, type in SOURCE_TYPES.items()}
    columns = {**nulls, "path": [str(row) for row in range(rows)], CHANGED: [False] * rows}
    batches = pa.table({IMAGE: pa.nulls(rows, pa.binary()), **columns}).to_batches(1)
    ends: dict[str, float] = {}

    def extract(batches: Iterator[Any]) -> Iterator[pd.DataFrame]:
        nonlocal now
        for _ in batches:
            now += 3
            same = {"width": [1], "height": 1, "truncated": False, "error": None}
            yield pd.DataFrame({"features": [np.zeros(1, np.float32)], **same})
            for path in tmp_path.glob("*.parquet"):
                ends.setdefault(path.name, now)

    open_run(task)
    write_parts(batches, task, 0, 0, extract)
    seconds = np.diff([0, *sorted(ends.values())])
    assert seconds[0] <= 6 and seconds[:-1].tolist() == sorted(seconds[:-1])
    assert max(seconds) <= 45 and len(seconds) < 30


def test_tasks_end_if_the_folder_of_their_run_is_not_there(tmp_path: Path) -> None:
    """Because it is on the driver's disk, or another run took over."""
    task = Task(Folder(tmp_path / "run"), "0a", (), {}, None, (), "snappy", 0.0)
    nulls = {name: pa.nulls(1, type) for name, type in SOURCE_TYPES.items()}
    columns = {**nulls, "path": ["a"], CHANGED: [False]}
    batches = pa.table({IMAGE: pa.nulls(1, pa.binary()), **columns}).to_batches()

    def extract(batches: Iterator[Any]) -> Iterator[pd.DataFrame]:
        list(batches)
        task.folder.delete("")
        same = {"width": [1], "height": 1, "truncated": False, "error": None}
        yield pd.DataFrame({"features": [np.zeros(1, np.float32)], **same})

    with pytest.raises(ImageVecError, match="share"):
        write_parts(batches, task, 0, 0, extract)
    assert not Path(task.folder.path).exists()
    open_run(task)
    with pytest.raises(ImageVecError, match="share"):
        write_parts(batches, task, 0, 0, extract)
    assert not Path(task.folder.path).exists()


SOURCE_TYPES = {
    "length": pa.int64(),
    "modificationTime": pa.timestamp("us", "UTC"),
    "version": pa.string(),
    SOURCE_ERROR: pa.string(),
}
