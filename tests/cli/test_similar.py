from __future__ import annotations

import json

import pytest

from imagevec.cli import main
from tests.helpers.tables import write_table


@pytest.fixture
def table(tmp_path) -> str:
    rows = {"file:/p/a.jpg": [1.0, 0.0], "file:/p/b.jpg": [-3.0, -4.0], "file:/p/c.jpg": [4.0, 3.0]}
    return str(write_table(tmp_path, rows))


def test_a_table_for_each_query(table, capsys):
    assert main(["similar", table, "--query", "/p/a.jpg", "--query", "/p/c.jpg", "-k", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "/p/a.jpg",
        "rank   cosine  path",
        "   1   0.8000  file:/p/c.jpg",
        "   2  -0.6000  file:/p/b.jpg",
        "",
        "/p/c.jpg",
        "rank   cosine  path",
        "   1   0.8000  file:/p/a.jpg",
        "   2  -0.9600  file:/p/b.jpg",
    ]


def test_json(table, capsys):
    assert main(["similar", table, "--query", "/p/a.jpg", "-k", "1", "--json"]) == 0
    neighbours = [{"path": "file:/p/c.jpg", "cosine": 0.8}]
    assert json.loads(capsys.readouterr().out) == {
        "queries": [{"query": "/p/a.jpg", "neighbours": neighbours}]
    }


def test_a_query_is_required(table, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["similar", table])
    assert raised.value.code == 2
    assert "--query" in capsys.readouterr().err


def test_k_below_1(table, capsys):
    assert main(["similar", table, "--query", "/p/a.jpg", "-k", "0"]) == 1
    assert "imagevec: k=0 is not valid" in capsys.readouterr().err
