from __future__ import annotations

import json

from imagevec import cache, plan
from imagevec.cli import main
from imagevec.plan import make_plan


def test_the_cache_is_listed_and_emptied(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan, "_plans", {})
    make_plan(model="squeezenet1_1", weights="random", engine="torch")
    (tmp_path / "weights.pth").write_bytes(bytes(2_000_000))
    stored = cache.store(tmp_path / "weights.pth")

    assert main(["cache"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'imagevec'}: 2.0 MB, limit 5 GB"
    assert any("2.0 MB" in line and stored.name[:20] in line for line in lines)
    assert any(line.endswith("squeezenet1_1") for line in lines)

    assert main(["cache", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert f"files/{stored.name}" in {entry["name"] for entry in listed["entries"]}
    assert sum(entry["bytes"] for entry in listed["entries"]) == listed["bytes"]

    assert main(["cache", "--clear"]) == 0
    assert "2.0 MB deleted" in capsys.readouterr().out
    assert main(["cache"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
