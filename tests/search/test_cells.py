from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagevec.search import cells as module
from imagevec.search.cells import Cells, _list_rows, _mapped, _new_array, _row_type
from imagevec.search.neighbours import nearest_units, unit_vectors


@given(st.integers(0, 60), st.integers(0, 4), st.integers(1, 9), st.integers(0, 99))
def test_rows_are_listed_by_cell(rows: int, columns: int, count: int, seed: int) -> None:
    cells = np.random.default_rng(seed).integers(0, count, (rows, columns), np.int32)
    out = np.empty(cells.size, np.int64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_LISTED_VALUES", 7)  # several blocks
        begins = _list_rows(cells, count, out)
    for cell in range(count):
        listed = out[begins[cell] : begins[cell + 1]].tolist()
        assert listed == np.argwhere(cells == cell)[:, 0].tolist()
    assert begins[0] == 0 and begins[-1] == cells.size


def test_row_numbers_above_32_bits() -> None:
    assert _row_type(np.broadcast_to(np.int32(0), (2**31 - 1, 3))) == np.int32
    assert _row_type(np.broadcast_to(np.int32(0), (2**31, 3))) == np.int64


@pytest.mark.parametrize("rows", [0, 5])
def test_arrays_are_mapped_not_loaded(tmp_path: Path, rows: int) -> None:
    array = _new_array(tmp_path / "a.npy", np.int32, (rows,))
    array[:] = np.arange(rows)
    mapped = _mapped(tmp_path / "a.npy")
    assert type(mapped) is np.ndarray and isinstance(mapped.base, np.memmap)
    assert mapped.tolist() == list(range(rows))


def test_queries_whose_cells_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared with all vectors."""
    monkeypatch.setattr(module, "shipped", lambda name: tmp_path / name)
    arrays: dict[str, Any] = {
        "centroids": np.eye(2, dtype=np.float32),
        "rows": np.arange(3, dtype=np.int32),
        "begins": np.array([0, 3, 3]),  # the second cell is empty
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    cells = Cells({name: f"{name}.npy" for name in arrays}, 1, [])
    units = unit_vectors(np.array([[1, 0], [1, 0.1], [1, -0.1]], np.float32))
    queries = unit_vectors(np.array([[0.1, 1], [0, 1]], np.float32))
    row, index, cosine = module.nearest_in_cells(queries, units, cells, 2)
    indices, cosines = nearest_units(queries, units, 2)
    assert row.tolist() == [0, 0, 1, 1]
    assert index.tolist() == indices.ravel().tolist()
    assert cosine.tolist() == cosines.ravel().tolist()
