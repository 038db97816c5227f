"""Folders that are written: one winner, atomic files, odd names, and answers that are lost."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

from imagevec.errors import ReadError, WriteError
from imagevec.storage import hdfs, stores
from imagevec.storage.folder import Folder
from imagevec.storage.local import LocalStore
from imagevec.storage.location import Location, UnsupportedURIError
from tests.helpers.object_store import TEST_KEYS, azure_server

NAMES = [
    "a.png",
    "a b",
    "100%",
    "100%25.png",
    "a#b",
    "a?b=c",
    "é",
    "日本",
    "a+b&c",
    "a@b:c",
    "[a]{b}",
]


class Busy:
    """In front of a store: it answers 503 to the next requests, before or after it acts."""

    def __init__(self, store: Callable[..., Any]) -> None:
        self._store = store
        self.method = ""
        self.before = self.after = 0

    def __call__(self, request: dict[str, Any], respond: Callable[..., Any]) -> Any:
        is_chosen = request["REQUEST_METHOD"] == self.method
        if is_chosen and self.before:
            self.before -= 1
        elif is_chosen and self.after:
            self.after -= 1
            b"".join(self._store(request, lambda *answer: None))
        else:
            return self._store(request, respond)
        respond("503 Slow Down", [("Content-Length", "0")])
        return []


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    """An S3 server with the bucket ``tables``, as the endpoint of the environment."""
    monkeypatch.setattr(stores, "_stores", type(stores._stores)())
    busy = Busy(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, busy, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {**TEST_KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="tables")
    for item in client.list_objects_v2(Bucket="tables").get("Contents", []):  # of another test
        client.delete_object(Bucket="tables", Key=item["Key"])
    client.close()
    yield busy
    server.shutdown()
    server.server_close()
    thread.join(30)


@pytest.fixture(scope="module")
def azure() -> Iterator[str]:
    """The connection string of an Azurite with the container ``tables``."""
    with azure_server("tables") as connection:
        yield connection


@pytest.fixture(params=["local", "s3", "azure", "memory"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Folder]:
    """A folder that does not exist yet, in each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("busy")
        yield Folder(f"s3://tables/{tmp_path.name}/new table")
    elif request.param == "azure":
        connection = request.getfixturevalue("azure")
        monkeypatch.setattr(stores, "_stores", type(stores._stores)())
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield Folder(f"az://tables/{tmp_path.name}/new table")
    elif request.param == "memory":
        yield Folder("memory://tables/new table")
        client = fsspec.filesystem("memory")
        client.store.clear()
        client.pseudo_dirs[:] = [""]
    else:
        yield Folder(tmp_path / "new table")


def test_busy_store_does_not_fail_the_reads_of_an_open_file(busy: Busy, tmp_path: Path) -> None:
    folder = Folder(f"s3://tables/{tmp_path.name}")
    content = os.urandom(1 << 20)
    folder.write("file", content)
    with folder.open("file") as file:
        busy.method, busy.before = "GET", 2
        file.seek(-10, os.SEEK_END)
        assert file.read() == content[-10:]
        busy.after = 2
        file.seek(0)
        assert file.read() == content
    assert (busy.before, busy.after) == (0, 0)


def test_folder_is_written_and_read(folder: Folder, tmp_path: Path) -> None:
    assert folder.names() == [] and folder.read("a") is None
    folder.write("b/c/d", b"1")
    folder.write("b/c/d", b"22")
    folder.write("a", b"")
    assert (folder.names(), folder.names(only_files=True)) == (["a", "b"], ["a"])
    assert folder.names("b/c") == folder.sub("b").names("c/") == ["d"]
    assert (folder.read("b/c/d"), folder.sub("b/c").read("d"), folder.read("a")) == (
        b"22",
        b"22",
        b"",
    )
    with folder.open("b/c/d") as file:
        assert file.read() == b"22"
    assert folder.read("none") is None
    with pytest.raises(FileNotFoundError):
        folder.download("none", tmp_path / "none")


def test_odd_names_survive(folder: Folder) -> None:
    is_fsspec = folder.location.scheme == "memory"  # its paths are globs
    names = [name for name in NAMES if not is_fsspec or not set(name) & set("[{?")]
    for name in names:
        folder.write(f"{name}/{name}", name.encode())
    assert folder.names() == sorted(names)
    for name in names:
        assert folder.names(name) == [name]
        assert folder.sub(name).read(name) == name.encode()
        assert folder.move(f"{name}/{name}", f"moved/{name}")
    assert folder.names("moved") == sorted(names)
    for name in names:
        folder.delete(f"moved/{name}")
    assert folder.names("moved") == []


def test_files_of_any_size_are_copied(folder: Folder, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 33  # several parts
    (tmp_path / "large").write_bytes(content)
    for size in (0, 1, len(content)):
        (tmp_path / "source").write_bytes(content[:size])
        folder.upload(tmp_path / "source", "models/weights")
        folder.download("models/weights", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == content[:size]
    assert folder.names("models") == ["weights"]


def test_move_replaces(folder: Folder) -> None:
    folder.write("a", b"new")
    folder.write("sub/b", b"old")
    assert folder.move("a", "sub/b")
    assert (folder.names(), folder.read("sub/b")) == (["sub"], b"new")
    assert not folder.move("a", "sub/b")
    assert not folder.move("a", "other/b")
    assert folder.names() == ["sub"]


def test_delete_takes_a_file_or_a_folder(folder: Folder) -> None:
    for path in ("a", "ab", "b/c/d", "b/e", "bc/f"):
        folder.write(path, b"1")
    folder.delete("a")
    folder.delete("b/")
    folder.delete("none")
    assert folder.names() == ["ab", "bc"]
    folder.delete_empty("bc")
    folder.delete_empty("none")
    assert folder.names("bc") == ["f"]
    folder.delete("")
    assert folder.names() == []


def test_folder_is_pickled(folder: Folder) -> None:
    folder.write("a", b"1")
    copied = pickle.loads(pickle.dumps(folder.sub("")))
    assert (copied.path, copied.read("a")) == (folder.path, b"1")
    assert not copied.path.endswith("/")


def test_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder("a/").path == f"{tmp_path}/a"
    assert Folder("s3://b/").path == "s3://b"
    assert Folder("/").path == "/"


def attempts(folder: Folder, path: str, count: int = 8) -> list[bool]:
    """Creates a file in threads that start at once."""
    start = threading.Barrier(count)

    def attempt(number: int) -> bool:
        start.wait(30)
        return folder.create(path, str(number).encode() * 1000)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(attempt, range(count)))


def test_create_has_one_winner(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "table")
    for number in range(50):
        won = attempts(folder, f"locks/{number}")
        assert won.count(True) == 1
        assert folder.read(f"locks/{number}") == str(won.index(True)).encode() * 1000
    assert os.listdir(tmp_path / "table") == ["locks"]
    assert len(os.listdir(tmp_path / "table" / "locks")) == 50


@pytest.mark.parametrize("folder", ["s3", "azure"], indirect=True)
def test_create_has_one_winner_in_an_object_store(folder: Folder) -> None:
    won = attempts(folder, "one")
    assert won.count(True) == 1
    assert folder.read("one") == str(won.index(True)).encode() * 1000


@pytest.mark.parametrize("number", ["EPERM", "EACCES", "ENOSYS", "ENOTSUP", "EOPNOTSUPP"])
def test_create_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(getattr(errno, number), "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    folder = Folder(tmp_path / "mounted")
    assert folder.create("a", b"1" * 1000)
    assert not folder.create("a", b"2")
    assert folder.read("a") == b"1" * 1000
    assert attempts(folder, "b").count(True) == 1
    assert sorted(os.listdir(tmp_path / "mounted")) == ["a", "b"]


def test_create_whose_link_was_made_before_the_answer(tmp_path: Path, monkeypatch) -> None:
    """NFS sends a request without an answer again."""
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert Folder(tmp_path).create("a", b"1")


def test_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch) -> None:
    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = Folder(tmp_path / "table")
    folder.write("a", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    for write in (folder.write, folder.create):
        with pytest.raises(WriteError, match=r"/b cannot be written: .*No space.*tries: 1"):
            write("b", b"new")
    with pytest.raises(WriteError, match="No space"):
        folder.write("a", b"new")
    assert folder.names() == ["a"] == os.listdir(tmp_path / "table")
    assert folder.read("a") == b"old"


def test_partial_file_without_hard_links_is_deleted(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    calls: list[int] = []

    def fail_second(number: int) -> None:
        calls.append(number)
        if len(calls) > 1:
            raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(WriteError, match="quota"):
        Folder(tmp_path).create("a", b"1")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", ["EROFS", "EDQUOT", "EACCES", "EPERM"])
def test_what_only_a_person_can_solve_is_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def refuse(store: LocalStore, location: Location) -> None:
        raise OSError(getattr(errno, number), "refused")

    monkeypatch.setattr(LocalStore, "delete", refuse)
    with pytest.raises(WriteError, match=r"cannot be written: .*refused \(tries: 1\)"):
        Folder(tmp_path).delete("a")


def test_folder_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    folder = Folder(tmp_path / "file")
    for act in (folder.write, folder.create):
        with pytest.raises(WriteError, match="not a folder"):
            act("a", b"1")


def test_written_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "plain").write_bytes(b"")
    folder.write("a", b"")
    folder.create("b", b"")
    folder.upload(tmp_path / "plain", "c")
    assert {(tmp_path / name).stat().st_mode for name in ("plain", "a", "b", "c")} == {
        (tmp_path / "plain").stat().st_mode
    }


def test_files_that_are_being_written_are_not_listed(tmp_path: Path) -> None:
    with stores.replacing(str(tmp_path / "a")):
        assert len(os.listdir(tmp_path)) == 1
        assert Folder(tmp_path).names() == []
    assert Folder(tmp_path).names() == ["a"]


def test_local_name_is_not_unquoted(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("a b", b"1")
    assert folder.read("a%20b") is None
    assert Folder(tmp_path / "%61").names() == []


def test_delete_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_bytes(b"1")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "link").symlink_to(tmp_path / "kept")
    Folder(tmp_path).delete("table")
    assert (tmp_path / "kept" / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("method", "act"),
    [
        ("PUT", lambda folder, file: folder.write("a", b"1")),
        ("PUT", lambda folder, file: folder.create("b", b"1")),
        ("PUT", lambda folder, file: folder.upload(file, "c")),
        ("PUT", lambda folder, file: folder.move("old", "d")),
        ("GET", lambda folder, file: folder.read("old")),
        ("GET", lambda folder, file: folder.names()),
        ("GET", lambda folder, file: folder.download("old", file)),
        ("GET", lambda folder, file: folder.delete("old")),
        ("POST", lambda folder, file: folder.delete("old")),
    ],
)
def test_busy_store_is_retried(busy: Busy, tmp_path: Path, method: str, act: Any) -> None:
    folder = Folder("s3://tables/busy", timeout_seconds=30)
    folder.write("old", b"1")
    (tmp_path / "file").write_bytes(b"1")
    busy.method, busy.before = method, 2
    assert act(folder, tmp_path / "file") in (None, True, b"1", ["old"])
    assert busy.before == 0


def test_store_that_stays_busy_is_an_error(busy: Busy, tmp_path: Path) -> None:
    folder = Folder("s3://tables/busy", timeout_seconds=0.5)
    busy.method, busy.before = "PUT", 1000
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(WriteError, match=r"s3://tables/busy/a cannot be written: .*503"):
        folder.write("a", b"1")
    with pytest.raises(WriteError, match=r"cannot be written: .*503"):
        folder.upload(tmp_path / "file", "a")
    busy.method = "GET"
    with pytest.raises(ReadError, match=r"cannot be read: .*503"):
        folder.read("a")


def test_lost_answer_of_create(busy: Busy) -> None:
    folder = Folder("s3://tables/lost", timeout_seconds=30)
    busy.method, busy.after = "PUT", 1
    assert folder.create("a", b"ours")
    assert not folder.create("a", b"theirs")
    busy.after = 1
    assert not folder.create("a", b"theirs")
    assert folder.read("a") == b"ours"


def test_lost_answer_of_move(busy: Busy) -> None:
    folder = Folder("s3://tables/lost", timeout_seconds=30)
    folder.write("old", b"1")
    busy.method, busy.after = "POST", 1  # the deletion of the source
    assert folder.move("old", "new")
    assert (folder.names(), folder.read("new")) == (["new"], b"1")
    assert busy.after == 0


def test_missing_bucket_is_an_error(busy: Busy) -> None:
    folder = Folder("s3://nobody/table")
    with pytest.raises(WriteError, match=r"bucket .*does not exist.*tries: 1"):
        folder.write("a", b"1")
    with pytest.raises(ReadError, match=r"bucket .*does not exist.*tries: 1"):
        folder.names()


def test_web_folder_is_only_read(tmp_path: Path) -> None:
    folder = Folder("https://photos.example/table")
    (tmp_path / "a").write_bytes(b"1")
    for act in (
        lambda: folder.write("a", b"1"),
        lambda: folder.create("a", b"1"),
        lambda: folder.upload(tmp_path / "a", "a"),
        lambda: folder.download("a", tmp_path / "a"),
        lambda: folder.move("a", "b"),
        lambda: folder.delete("a"),
        lambda: folder.delete_empty("a"),
    ):
        with pytest.raises(UnsupportedURIError, match="only read"):
            act()


def test_hdfs_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_stores", type(stores._stores)())
    monkeypatch.setattr(hdfs, "store_of", lambda location: hdfs.HadoopStore(fs.LocalFileSystem()))
    folder = Folder(f"hdfs://host:1{tmp_path}/table")
    (tmp_path / "file").write_bytes(b"333")
    folder.write("b/a", b"1")
    folder.write("b/a", b"22")
    folder.upload(tmp_path / "file", "c d%?")
    assert folder.names() == ["b", "c d%?"]
    assert folder.move("b/a", "e/f") and not folder.move("b/a", "e/f")
    folder.download("e/f", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"22"
    folder.delete_empty("e")
    folder.delete_empty("b")
    folder.delete("none")
    assert folder.names() == ["c d%?", "e"]
    folder.delete("")
    assert folder.names() == []
    with pytest.raises(UnsupportedURIError, match="no conditional writes"):
        folder.create("a", b"1")
