from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from imagevec import OptionError
from imagevec.table.read import (
    RowGroup,
    column_metadata,
    read_groups,
    read_paths,
    read_vectors,
)
from tests.helpers.object_store import TEST_KEYS, s3_server
from tests.helpers.pipeline import run_python
from tests.helpers.tables import FLOATS, write_table


def read_all(folder: Path | str) -> tuple[list[str], np.ndarray]:
    blocks = list(read_vectors(folder))
    paths = [path for paths, _ in blocks for path in paths]
    return paths, np.concatenate([vectors for _, vectors in blocks])


def test_paths_and_features_of_all_files(tmp_path):
    write_table(tmp_path / "t", {"file:/b/1.jpg": [1, 2, 3], "/b/2 3.jpg": [4, 5, 6]}, part=0)
    write_table(tmp_path / "t", {"s3://bucket/ü.jpg": [7, 8, 9]}, part=1)
    (tmp_path / "t" / "_SUCCESS").touch()
    (tmp_path / "t" / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    (tmp_path / "t" / "_temporary").mkdir()
    (tmp_path / "t" / "_temporary" / "part.parquet").write_bytes(b"half a file")
    for folder in (tmp_path / "t", str(tmp_path / "t"), (tmp_path / "t").as_uri()):
        paths, features = read_all(folder)
        assert paths == ["file:/b/1.jpg", "/b/2 3.jpg", "s3://bucket/ü.jpg"]
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_rows_without_features_are_left_out(tmp_path):
    rows = {str(number): None if number % 3 == 0 else [number, -number] for number in range(10)}
    paths, features = read_all(write_table(tmp_path, rows))
    assert paths == ["1", "2", "4", "5", "7", "8"]
    assert features.tolist() == [[number, -number] for number in (1, 2, 4, 5, 7, 8)]


FIXED_SIZE = pytest.param(
    pa.list_(pa.float32(), 2),
    marks=pytest.mark.skipif(
        int(pa.__version__.partition(".")[0]) < 26,
        reason="before 26, PyArrow does not read a column of fixed-size lists with nulls",
    ),
)


@pytest.mark.parametrize("type", [pa.list_(pa.float64()), pa.large_list(pa.float32()), FIXED_SIZE])
def test_any_list_of_floats_will_do(tmp_path, type):
    rows = {"a": [0.1, 2], "b": None, "c": [3, 4]}
    paths, features = read_all(write_table(tmp_path, rows, type))
    assert paths == ["a", "c"]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, np.array([[0.1, 2], [3, 4]]))


def test_a_null_in_a_vector_is_nan(tmp_path):
    _, features = read_all(write_table(tmp_path, {"a": [1, None]}))
    np.testing.assert_array_equal(features, [[1, np.nan]])


def test_a_table_of_other_columns_too_is_read(tmp_path):
    table = pa.table(
        {
            "error": pa.array([None], pa.string()),
            "features": pa.array([[1.0]], FLOATS),
            "path": ["a"],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_all(tmp_path)[0] == ["a"]


def write_other(folder: Path, **columns: Any) -> None:
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), folder / "part-0.parquet")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match="nowhere does not exist: give the folder that .imagevec"):
        read_all(tmp_path / "nowhere")


def test_a_folder_without_parquet_files(tmp_path):
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(OptionError, match="has no Parquet files: give the folder"):
        read_all(tmp_path)


def test_a_folder_of_other_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff not a table")
    with pytest.raises(OptionError, match="has no Parquet files: give the folder"):
        read_all(tmp_path)


def test_note_beside_the_table_is_ignored(tmp_path):
    write_table(tmp_path, {"a": [1, 2]}, part=0)
    (tmp_path / "README.txt").write_text("a note")
    assert read_all(tmp_path)[0] == ["a"]


def test_table_in_an_object_store(tmp_path, monkeypatch):
    write_table(tmp_path, {"a": [1, 2], "b": [3, 4]}, part=0)
    (file,) = tmp_path.glob("*.parquet")
    with s3_server() as (endpoint, client):
        client.create_bucket(Bucket="tables")
        client.put_object(Bucket="tables", Key="f/part-0.parquet", Body=file.read_bytes())
        client.put_object(Bucket="tables", Key="f/_SUCCESS", Body=b"")
        for name, value in {**TEST_KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        paths, features = read_all("s3a://tables/f")
    assert paths == ["a", "b"] and features.tolist() == [[1, 2], [3, 4]]


def test_a_damaged_file_among_good_ones(tmp_path):
    write_table(tmp_path, {"a": [1, 2]}, part=0)
    (tmp_path / "part-00001.snappy.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(OptionError, match="cannot be read as Parquet"):
        read_all(tmp_path)


def test_columns_that_are_missing(tmp_path):
    write_other(tmp_path, path=["a"], content=[b"x"])
    with pytest.raises(OptionError, match=r"no column 'features', only \['path', 'content'\]"):
        read_all(tmp_path)


@pytest.mark.parametrize("features", [["a"], [1.0], [["a"]], [[1, 2]]])
def test_features_of_another_type(tmp_path, features):
    write_other(tmp_path, path=["a"], features=features)
    with pytest.raises(OptionError, match="not list<float>"):
        read_all(tmp_path)


@pytest.mark.parametrize("rows", [{}, {"a": None, "b": None}])
def test_no_features_at_all(tmp_path, rows):
    with pytest.raises(OptionError, match="has no features"):
        read_all(write_table(tmp_path, rows))


def test_vectors_of_two_models(tmp_path):
    write_table(tmp_path, {"a": [1, 2], "b": [1, 2]}, part=0)
    write_table(tmp_path, {"c": [1, 2, 3]}, part=1)
    with pytest.raises(OptionError, match=r"vectors of \[2, 3\] features: use one model"):
        read_all(tmp_path)


def test_row_groups_can_be_read_by_themselves(tmp_path):
    write_table(tmp_path / "t", {"a": [1, 2], "b": None, "c": [3, 4]}, part=0)
    write_table(tmp_path / "t", {"d": [5, 6], "e": [7, 8]}, part=1)
    found = dict(read_paths(tmp_path / "t"))
    first, second = (str(tmp_path / f"t/part-0000{part}.snappy.parquet") for part in (0, 1))
    assert found == {
        RowGroup(first, 0): ["a", "b"],
        RowGroup(first, 1): ["c"],
        RowGroup(second, 0): ["d", "e"],
    }
    wanted = {RowGroup(first, 1), RowGroup(second, 0)}
    blocks = [(paths, vectors.tolist()) for paths, vectors in read_vectors(tmp_path / "t", wanted)]
    assert blocks == [(["c"], [[3, 4]]), (["d", "e"], [[5, 6], [7, 8]])]


def test_a_row_without_a_path_is_left_out(tmp_path):
    write_other(tmp_path, path=["a", None], features=[[1.0], [2.0]])
    assert read_all(tmp_path)[0] == ["a"]


def test_paths_may_be_a_dictionary(tmp_path):
    write_other(tmp_path, path=pa.array(["a", "b"]).dictionary_encode(), features=[[1.0], [2.0]])
    assert read_all(tmp_path)[0] == ["a", "b"]


def test_paths_of_another_type(tmp_path):
    write_other(tmp_path, path=[1], features=[[1.0]])
    with pytest.raises(OptionError, match="'path' of .* is of type int64, not string: give"):
        read_all(tmp_path)


def test_a_later_file_without_the_column(tmp_path):
    write_table(tmp_path, {"a": [1, 2]}, part=0)
    parquet.write_table(pa.table({"path": ["b"]}), tmp_path / "part-1.parquet")
    with pytest.raises(OptionError, match="has no column 'features'"):
        read_all(tmp_path)


def test_one_file_instead_of_a_folder(tmp_path):
    write_table(tmp_path, {"a": [1, 2]})
    (file,) = tmp_path.iterdir()
    assert read_all(file)[0] == ["a"]


def test_groups(tmp_path):
    write_other(tmp_path / "g", path=["a", "b", None], group=["a", "a", "a"])
    assert list(read_groups(tmp_path / "g")) == [(["a", "b"], ["a", "a"])]
    with pytest.raises(OptionError, match="no column 'group'.*`imagevec duplicates` wrote"):
        list(read_groups(write_table(tmp_path / "t", {"a": [1]})))
    with pytest.raises(OptionError, match="nowhere does not exist: .*`imagevec duplicates` wrote"):
        list(read_groups(tmp_path / "nowhere"))


def test_metadata_of_a_column(tmp_path):
    fields = [
        {"name": "path", "metadata": {}},
        {"name": "features", "metadata": {"a": 1}},
    ]
    metadata = {"org.apache.spark.sql.parquet.row.metadata": json.dumps({"fields": fields})}
    table = pa.table({"path": ["a"], "features": [[1.0]]}).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "x.parquet")
    assert column_metadata(tmp_path, "features") == {"a": 1}
    assert column_metadata(tmp_path, "path") == column_metadata(tmp_path, "other") == {}
    assert column_metadata(write_table(tmp_path / "t", {"a": [1]}), "features") == {}


def test_memory_does_not_grow_with_the_table(tmp_path):
    """A row group of 64 MB, as Spark makes them."""
    vectors = np.random.default_rng(0).random(16_000_000, np.float32)
    features = pa.FixedSizeListArray.from_arrays(vectors, 1000).cast(pa.list_(pa.float32()))
    table = pa.table({"path": [str(row) for row in range(16_000)], "features": features})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=16_000)
    printed = run_python(
        "import pyarrow as pa; from imagevec.table.read import read_vectors; "
        f"print(sum(len(paths) for paths, _ in read_vectors({str(tmp_path)!r})), "
        "pa.default_memory_pool().max_memory())"
    )
    rows, most_bytes = map(int, printed.split())
    assert rows == 16_000
    assert most_bytes < 48_000_000


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ("_delta_log/00000000000000000000.json", "Delta"),
        ("metadata/v1.metadata.json", "Iceberg"),
        ("metadata/00001-5f.metadata.json", "Iceberg"),
        (".hoodie/hoodie.properties", "Hudi"),
    ],
)
def test_tables_whose_files_contain_deleted_rows_are_refused(tmp_path, log, kind):
    write_table(tmp_path, {"a": [1, 2]})
    (tmp_path / log).parent.mkdir()
    (tmp_path / log).touch()
    for read in (read_vectors, read_paths):
        with pytest.raises(OptionError, match=rf"{kind}.*--format {kind.lower()}"):
            list(read(tmp_path))
    with pytest.raises(OptionError, match=kind):
        column_metadata(tmp_path, "features")
