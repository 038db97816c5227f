from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from imagevec import OptionError
from imagevec.table.read import read_features
from tests.helpers.tables import FLOATS, write_table


def test_paths_and_features_of_all_files(tmp_path):
    write_table(tmp_path / "t", {"file:/b/1.jpg": [1, 2, 3], "/b/2 3.jpg": [4, 5, 6]}, part=0)
    write_table(tmp_path / "t", {"s3://bucket/ü.jpg": [7, 8, 9]}, part=1)
    (tmp_path / "t" / "_SUCCESS").touch()
    (tmp_path / "t" / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    (tmp_path / "t" / "_temporary").mkdir()
    (tmp_path / "t" / "_temporary" / "part.parquet").write_bytes(b"half a file")
    for folder in (tmp_path / "t", str(tmp_path / "t"), (tmp_path / "t").as_uri()):
        paths, features = read_features(folder)
        assert paths == ["file:/b/1.jpg", "/b/2 3.jpg", "s3://bucket/ü.jpg"]
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_rows_without_features_are_left_out(tmp_path):
    rows = {str(number): None if number % 3 == 0 else [number, -number] for number in range(10)}
    paths, features = read_features(write_table(tmp_path, rows))
    assert paths == ["1", "2", "4", "5", "7", "8"]
    assert features.tolist() == [[number, -number] for number in (1, 2, 4, 5, 7, 8)]


@pytest.mark.parametrize(
    "type",
    [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)],
)
def test_any_list_of_floats_will_do(tmp_path, type):
    rows = {"a": [0.1, 2], "b": None, "c": [3, 4]}
    paths, features = read_features(write_table(tmp_path, rows, type))
    assert paths == ["a", "c"]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, [[0.1, 2], [3, 4]])


def test_a_null_in_a_vector_is_nan(tmp_path):
    _, features = read_features(write_table(tmp_path, {"a": [1, None]}))
    np.testing.assert_array_equal(features, [[1, np.nan]])


def test_the_array_is_ours_to_change(tmp_path):
    _, features = read_features(write_table(tmp_path, {"a": [1, 2]}))
    features += 1
    assert features.tolist() == [[2, 3]]


def test_a_table_of_other_columns_too_is_read(tmp_path):
    table = pa.table(
        {
            "error": pa.array([None], pa.string()),
            "features": pa.array([[1.0]], FLOATS),
            "path": ["a"],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_features(tmp_path)[0] == ["a"]


def write_other(folder: Path, **columns: Any) -> None:
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), folder / "part-0.parquet")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match="nowhere is not there: give the folder that .imagevec"):
        read_features(tmp_path / "nowhere")


def test_a_folder_without_parquet_files(tmp_path):
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(OptionError, match="holds no Parquet files: give the folder"):
        read_features(tmp_path)


def test_a_folder_of_other_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff not a table")
    with pytest.raises(OptionError, match="cannot be read as Parquet: give the folder"):
        read_features(tmp_path)


def test_a_damaged_file_among_good_ones(tmp_path):
    write_table(tmp_path, {"a": [1, 2]}, part=0)
    (tmp_path / "part-00001.snappy.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(OptionError, match="cannot be read as Parquet"):
        read_features(tmp_path)


def test_columns_that_are_missing(tmp_path):
    write_other(tmp_path, path=["a"], content=[b"x"])
    with pytest.raises(OptionError, match=r"no column 'features', only \['path', 'content'\]"):
        read_features(tmp_path)


@pytest.mark.parametrize("features", [["a"], [1.0], [["a"]], [[1, 2]]])
def test_features_of_another_type(tmp_path, features):
    write_other(tmp_path, path=["a"], features=features)
    with pytest.raises(OptionError, match="not list<float>"):
        read_features(tmp_path)


@pytest.mark.parametrize("rows", [{}, {"a": None, "b": None}])
def test_no_features_at_all(tmp_path, rows):
    with pytest.raises(OptionError, match="holds no features"):
        read_features(write_table(tmp_path, rows))


def test_vectors_of_two_models(tmp_path):
    write_table(tmp_path, {"a": [1, 2], "b": [1, 2]}, part=0)
    write_table(tmp_path, {"c": [1, 2, 3]}, part=1)
    with pytest.raises(OptionError, match=r"vectors of \[2, 3\] features: use one model"):
        read_features(tmp_path)
