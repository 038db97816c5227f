"""The user's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from imagevec import OptionError, cache, plan
from imagevec.files import digest_of
from imagevec.plan import make_plan
from imagevec.spec import with_decode
from tests.helpers.factories import tiny
from tests.helpers.pipeline import run_python, saved

MODEL: dict[str, Any] = {"model": "squeezenet1_1", "weights": "random", "engine": "torch"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that remembers nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(cache, "_in_use", set())
    return tmp_path / "cache" / "imagevec"


def file_of(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / f"{len(content)}.bin"
    path.write_bytes(content)
    return path


def test_a_file_is_stored_under_its_digest(folder: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, b"content")
    stored = cache.store(path)
    assert stored.name == f"imagevec-{digest_of(path)}.bin"
    assert stored.read_bytes() == b"content"
    assert path.exists()
    assert cache.find(digest_of(path)) == stored
    assert cache.find("0" * 64) is None


def test_a_file_that_is_moved_is_there_once(folder: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, b"content")
    cache.store(path, move=True)
    assert not path.exists()


def test_of_too_much_the_least_recently_used_is_deleted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "0.000002")  # 2,000 bytes
    first, second = (cache.store(file_of(tmp_path, bytes(size))) for size in (900, 901))
    for age, path in enumerate((second, first)):
        os.utime(path, (1000 - age, 1000))
    os.utime(second, (2000, 1000))
    monkeypatch.setattr(cache, "_in_use", set())  # as if another process had made them
    third = cache.store(file_of(tmp_path, bytes(902)))
    assert not first.exists()
    assert second.exists()
    assert third.exists()


def test_what_this_process_uses_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "0")
    paths = [cache.store(file_of(tmp_path, bytes(size))) for size in (900, 901)]
    assert all(path.exists() for path in paths)


def test_use_is_noted_and_the_content_stays_known(folder: Path, tmp_path: Path) -> None:
    path = cache.store(file_of(tmp_path, b"content"))
    os.utime(path, (1000, 1000))
    cache.use(path)
    assert path.stat().st_atime > 1000
    assert path.stat().st_mtime == 1000


def test_a_limit_that_is_no_number_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "much")
    with pytest.raises(OptionError, match="IMAGEVEC_CACHE_GB='much'"):
        cache.store(file_of(tmp_path, b"content"))


def test_what_a_killed_process_left_is_deleted(folder: Path, tmp_path: Path) -> None:
    left = cache.folder("tmp") / "left"
    left.mkdir()
    os.utime(left, (1000, 1000))
    cache.store(file_of(tmp_path, b"content"))
    assert not left.exists()


def test_a_record_without_its_files_is_forgotten(folder: Path, tmp_path: Path) -> None:
    stored = cache.store(file_of(tmp_path, b"content"))
    cache.remember("key", {"files": [stored.name], "spec": {"model": "m"}})
    assert cache.recall("key") == {"files": [stored.name], "spec": {"model": "m"}}
    assert {cache.models()[entry.path.name] for entry in cache.entries()} == {"m"}
    stored.write_bytes(b"altered")
    assert cache.recall("key") is None
    stored.unlink()
    assert cache.recall("key") is None


def test_a_damaged_record_is_forgotten(folder: Path) -> None:
    for text in ("", "[]", "{}", '{"files": 7}'):
        (cache.folder("plans") / "key.json").write_text(text)
        assert cache.recall("key") is None


def test_clear_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    cache.store(file_of(tmp_path, b"content"))
    cache.clear()
    assert cache.entries() == []


def test_a_plan_is_made_once_in_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_plan(**MODEL)
    monkeypatch.setattr(plan, "_of_source", None)
    assert make_plan(**MODEL) is first


def test_another_model_in_the_same_file_is_another_plan(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any]
    options = {"model": tiny, "weights": str(tmp_path / "w.pth"), "engine": "torch"}
    saved(tiny, tmp_path / "w.pth", seed=1)
    first = make_plan(**options)
    saved(tiny, tmp_path / "w.pth", seed=2)
    assert make_plan(**options) != first


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_remembered_plan_builds_no_model_and_imports_no_pytorch(
    folder: Path, engine: str
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    options = {**MODEL, "engine": engine}
    first = make_plan(**options)
    printed = run_python(f"""
import sys
from imagevec.plan import make_plan
plan = make_plan(**{options})
print(plan.key, {{"torch", "torchvision", "timm"}} & sys.modules.keys())
""")
    assert printed == f"{first.key} set()\n"


def test_precisions_share_a_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    options = {**MODEL, "engine": "openvino"}
    first = make_plan(**options)
    monkeypatch.setattr("imagevec.engines.openvino.convert", None)
    other = make_plan(**options, precision="bfloat16", decode="scaled")
    assert other.files == first.files
    assert other.spec.precision == "bfloat16"
    assert other.spec.preprocessing == with_decode(first.spec.preprocessing, "scaled")
    assert other.key != first.key


def test_a_model_is_there_once(folder: Path) -> None:
    pytest.importorskip("openvino")
    make_plan(**{**MODEL, "engine": "openvino"})
    graphs = [path for path in folder.rglob("*") if path.suffix in (".xml", ".bin")]
    assert len(graphs) == 2


MAIN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.kinds = {"a", "b", "c", "d"}
        self.scale = SCALE

    def forward(self, images):
        return self.fc(images.mean((2, 3))) * self.scale

def build():
    torch.manual_seed(0)
    return Net()

from imagevec.plan import make_plan
from imagevec.engines import openvino
converted = []
convert = openvino.convert
openvino.convert = lambda model: converted.append(1) or convert(model)
plan = make_plan(model=build, engine="openvino")
print(len(converted), *plan.files)
"""


def test_a_class_of_main_is_known_in_the_next_process(folder: Path) -> None:
    pytest.importorskip("openvino")
    first, again = (
        run_python(MAIN.replace("SCALE", "2"), PYTHONHASHSEED=seed).split() for seed in "12"
    )
    assert (first[0], again[0]) == ("1", "0")
    assert first[1:] == again[1:]
    other = run_python(MAIN.replace("SCALE", "3")).split()
    assert other[0] == "1"
    assert other[1:] != first[1:]
    changed = run_python(MAIN.replace("SCALE", "2").replace("* self.scale", "+ self.scale"))
    assert changed.split()[0] == "1"


def test_the_newest_option_of_weights_is_found(folder: Path) -> None:
    spec = {"model": "m", "weights": "sha256:1"}
    for number, weights in enumerate(("first", "last")):
        cache.remember(weights, {"files": [], "spec": spec, "weights": weights})
        os.utime(cache.folder("plans") / f"{weights}.json", (0, number))
    cache.remember("other", {"files": [], "spec": {**spec, "model": "n"}, "weights": "other"})
    cache.remember("old", {"files": [], "spec": spec})
    (cache.folder("plans") / "bad.json").write_text("[]")
    assert cache.weights_option("m", "sha256:1") == "last"
    assert cache.weights_option("m", "sha256:2") is None
    used = {entry.path.name: entry.used for entry in cache.entries()}
    assert used["first.json"] == 0  # looking is not using
