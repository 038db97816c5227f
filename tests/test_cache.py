"""The user's cache."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from imagevec import ImageVecError, OptionError, Preprocessing, cache, plan
from imagevec.files import digest_of
from imagevec.plan import make_plan
from tests.helpers.factories import tiny
from tests.helpers.pipeline import run_python, saved

MODEL: dict[str, Any] = {"model": "squeezenet1_1", "weights": "random", "engine": "torch"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that remembers nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "_plans", {})
    use_nothing()
    return tmp_path / "cache" / "imagevec"


def use_nothing() -> None:
    """Makes this process forget what it uses, as if another process had used it."""
    cache._in_use.clear()
    if cache._notes is not None:
        os.close(cache._notes[0])
        cache._notes = None


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
    use_nothing()
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
    assert isinstance(first.spec.preprocessing, Preprocessing)
    expected = dataclasses.replace(first.spec.preprocessing, decode="scaled")
    assert other.spec.preprocessing == expected
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


NO_HOME = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}
PLANNED = f"""
import logging
logging.basicConfig(format="%(message)s", stream=__import__("sys").stdout)
from imagevec import cache
from imagevec.plan import make_plan
make_plan(**{ {**MODEL, "engine": "auto"} })
make_plan(**{MODEL})
print(cache.root())
"""


def nameless(command: list[str]) -> list[str]:
    """Runs a command as a user without a name, as root, who may still read this checkout."""
    read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    return ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *read, *command]


def test_without_a_home_the_cache_is_private(tmp_path: Path) -> None:
    warning, root = run_python(PLANNED, TMPDIR=str(tmp_path), **NO_HOME).splitlines()
    private = tmp_path / f"imagevec-{os.getuid()}"
    assert root == str(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert str(private) in warning and "XDG_CACHE_HOME" in warning


@pytest.mark.skipif(not shutil.which("setpriv") or os.getuid() != 0, reason="needs root")
@pytest.mark.parametrize("home", [["-u", "HOME"], ["HOME=/nonexistent"]], ids=["unset", "missing"])
def test_a_user_without_a_name_can_plan(tmp_path: Path, home: list[str]) -> None:
    tmp_path.chmod(0o777)
    environment = ["env", *home, f"TMPDIR={tmp_path}", "XDG_CACHE_HOME="]
    command = nameless([*environment, sys.executable, "-c", PLANNED])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "imagevec-12345")


def in_a_link(private: Path) -> None:
    (private.parent / "elsewhere").mkdir(mode=0o700)
    private.symlink_to("elsewhere")


def open_to_all(private: Path) -> None:
    private.mkdir()
    private.chmod(0o777)


def owned_by_another(private: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")
    private.mkdir(mode=0o700)
    os.chown(private, 12345, 12345)


@pytest.mark.parametrize("prepared", [in_a_link, open_to_all, owned_by_another])
def test_a_folder_that_another_user_may_have_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Any
) -> None:
    for name, value in NO_HOME.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    prepared(tmp_path / f"imagevec-{os.getuid()}")
    with pytest.raises(ImageVecError, match="not a private folder.*XDG_CACHE_HOME"):
        cache.folder("files")


def test_a_chosen_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    with pytest.raises(ImageVecError, match="XDG_CACHE_HOME='/dev/null/cache'"):
        cache.folder("files")


def test_a_download_that_cannot_be_stored_names_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", "/dev/null/torch")
    with pytest.raises(ImageVecError, match="Not a directory.*XDG_CACHE_HOME"):
        make_plan(model="squeezenet1_1", engine="torch")


def test_a_tilde_of_nobody_is_a_missing_file() -> None:
    with pytest.raises(ImageVecError, match="no such file"):
        make_plan(**{**MODEL, "weights": "~nobody-by-this-name/w.pth"})


@contextmanager
def user_of(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses an entry, and waits."""
    code = f"""
from pathlib import Path
from imagevec import cache
cache.use(Path({str(path)!r}))
print("used", flush=True)
input()
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_trim_keeps_what_another_process_uses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.store(file_of(tmp_path, bytes(900)))
    use_nothing()
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "0")
    with user_of(path) as process:
        cache.trim()
        assert path.exists()
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        cache.trim()
        assert not path.exists()
    assert len(list((folder / "uses").iterdir())) == 0


def test_uses_are_noted_again_after_another_process_clears_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store(file_of(tmp_path, bytes(900)))
    run_python("from imagevec import cache; cache.clear()")
    path = cache.store(file_of(tmp_path, bytes(900)))
    run_python("from imagevec import cache; cache.trim()", **{cache.LIMIT_VARIABLE: "0"})
    assert path.exists()


def test_threads_that_plan_the_same_build_it_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    of_source = plan._of_source

    def counted(*arguments: Any) -> Any:
        built.append(1)
        return of_source(*arguments)

    monkeypatch.setattr(plan, "_of_source", counted)
    barrier = Barrier(4)

    def planned(_: int) -> Any:
        barrier.wait()
        return make_plan(**MODEL)

    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(planned, range(4)))
    assert len(built) == 1
    assert all(made is plans[0] for made in plans)


FULL = """
mount -t tmpfs -o size=1m tmpfs "$1" && XDG_CACHE_HOME="$1" "$2" -c '
from pathlib import Path
from imagevec import ImageVecError, cache
from imagevec.models.state_dict import save_state_dict
from imagevec.plan import make_plan
from torch import nn
for write in (
    lambda: cache.store(Path("w.pth")),
    lambda: save_state_dict(nn.Linear(1000, 1000)),
    lambda: make_plan(model="squeezenet1_1", weights="random"),
):
    try:
        write()
    except ImageVecError as error:
        print(error)
print(list(cache.folder("tmp").iterdir()), cache.entries())
'
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "w.pth").write_bytes(bytes(3_000_000))
    (tmp_path / "full").mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", str(tmp_path / "full"), sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    if "unshare: " in done.stderr or "mount: " in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    *errors, left = done.stdout.splitlines()
    for error, needed in zip(errors, ("3.0", "4.0", "2.9"), strict=True):
        start = f"{tmp_path}/full/imagevec is full ({needed} MB are needed, 1.0 MB are free): "
        assert error.startswith(start)
        assert "XDG_CACHE_HOME" in error
    assert left == "[] []"
