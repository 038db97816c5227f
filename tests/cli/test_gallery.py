from __future__ import annotations

import json

import pyarrow as pa
from pyarrow import parquet

from imagevec.cli import main
from imagevec.errors import IMAGE_ERROR_CODES
from tests.helpers.tables import write_images, write_table


def test_a_page(tmp_path, capsys):
    table = write_table(tmp_path / "t", {f"{number}.jpg": [1.0, number] for number in range(5)})
    arguments = ["gallery", str(table), "--out", str(tmp_path / "g.html"), "--max-images", "3"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"3 images in {tmp_path / 'g.html'}\n"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 3, "out": str(tmp_path / "g.html")}


def test_groups(tmp_path, capsys):
    table = write_table(tmp_path / "t", {f"{number}.jpg": [1.0, number] for number in range(5)})
    groups = pa.table({"path": ["1.jpg", "4.jpg"], "group": ["1.jpg", "1.jpg"]})
    parquet.write_table(groups, tmp_path / "groups.parquet")
    out = tmp_path / "g.html"
    arguments = ["gallery", str(table), "--out", str(out), "--max-images", "2"]
    assert main([*arguments, "--groups", str(tmp_path / "groups.parquet")]) == 0
    page = out.read_text("utf-8")
    assert '"groups":[[0,1]]' in page
    assert '"name":"1.jpg"' in page and '"name":"4.jpg"' in page
    assert main([*arguments, "--groups", str(tmp_path / "nowhere")]) == 1
    assert "`imagevec duplicates` wrote" in capsys.readouterr().err


def test_allowed_roots(tmp_path):
    inside, outside = write_images(tmp_path, ["in/a.png", "out/b.png"])
    table = write_table(tmp_path / "t", {inside: [1.0], outside: [2.0]})
    out = tmp_path / "g.html"
    roots = f"{tmp_path}/in,s3://photos"
    assert main(["gallery", str(table), "--out", str(out), "--allowed-roots", roots]) == 0
    page = out.read_text("utf-8")
    assert page.count('"thumbnail":') == 1
    assert page.count(f'"problem":"{IMAGE_ERROR_CODES["forbidden_path"]}"') == 1
