"""Where files lie: one client for each place, and names that lead back to the file."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from pyarrow import fs

from imagevec.storage import stores
from imagevec.storage.stores import UnsupportedURIError, local_path, scheme_of, store_of

NAMES = ["a.png", "a b.png", "a@b.png", "a:b.png", "ä.png", "a#b.png", "a?b.png", "100%.png"]
NAMES += ["100%25.png", "a+b.png", "a&b=c.png", "a[1].png", "a\\b.png"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client is left of another test, and none stays; no settings of this machine count."""
    monkeypatch.setattr(stores, "_stores", {})
    monkeypatch.setattr(stores, "_locks", {})
    for name in ("REGION", "DEFAULT_REGION", "ENDPOINT_URL", "ENDPOINT_URL_S3"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)


class Clients:
    """Takes the place of a constructor of clients; remembers what each was made of."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.blocked = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        self.blocked.set()
        assert self.go_on.wait(30)
        self.made.append({"arguments": arguments, **options})
        return SimpleNamespace(**self.made[-1])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Clients:
    clients = Clients()
    monkeypatch.setattr(fs, "S3FileSystem", clients)
    monkeypatch.setattr(fs, "resolve_s3_region", lambda bucket: f"region-of-{bucket}")
    return clients


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        ("a.png", "file"),
        ("/a.png", "file"),
        ("file:/a.png", "file"),
        ("FILE:///a.png", "file"),
        ("a:b.png", "file"),
        ("C:\\a.png", "file"),
        ("1://a", "file"),
        ("S3a://b/a.png", "s3a"),
        ("x-y+z.1://a", "x-y+z.1"),
    ],
)
def test_the_scheme_of_a_path(path: str, scheme: str) -> None:
    assert scheme_of(path) == scheme


@pytest.mark.parametrize("path", ["/a b", "file:/a b", "file:///a b", "FILE:/a b"])
def test_the_local_path_of_a_uri(path: str) -> None:
    assert local_path(path) == "/a b"


def test_a_relative_path_stays_one() -> None:
    assert local_path("a/b") == "a/b"


def test_a_place_has_one_client_however_many_threads_ask(s3: Clients) -> None:
    s3.go_on.clear()
    uris = [f"s3://{bucket}/{number}.png" for number in range(8) for bucket in ("one", "two")]
    with ThreadPoolExecutor(len(uris)) as pool:
        found = [pool.submit(store_of, uri) for uri in uris]
        assert s3.blocked.wait(30)
        s3.go_on.set()
        places = {id(future.result()) for future in found}
    assert len(places) == len(s3.made) == 2


def test_another_user_or_setting_has_another_client(s3: Clients) -> None:
    for uri in ("s3://b/a", "s3://k:s@b/a", "s3://b/a?region=x", "s3://b/a?region=y"):
        assert store_of(uri) is store_of(f"{uri.partition('?')[0]}b?{uri.partition('?')[2]}")
    assert len(s3.made) == 4


def test_a_client_that_is_slow_to_make_keeps_no_other_one_waiting(s3: Clients) -> None:
    s3.go_on.clear()
    thread = threading.Thread(target=store_of, args=("s3://slow/a.png",))
    thread.start()
    assert s3.blocked.wait(30)
    assert store_of("memory://a/b.png")
    s3.go_on.set()
    thread.join(30)
    assert len(s3.made) == 1


def test_a_client_that_could_not_be_made_is_made_later(s3: Clients, monkeypatch) -> None:
    def fail(bucket: str) -> str:
        raise OSError("there is no network")

    with monkeypatch.context() as patched:
        patched.setattr(fs, "resolve_s3_region", fail)
        with pytest.raises(OSError, match="no network"):
            store_of("s3://b/a.png")
    assert store_of("s3://b/a.png")


def test_one_client_knows_all_web_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else millions of addresses of images would make a client for each host."""
    assert store_of("https://a.example/1.png") is store_of("https://b.example/2.png")


def test_each_account_has_its_own_client_of_fsspec() -> None:
    assert store_of("memory://a/1.png") is store_of("memory://a/2.png")
    assert store_of("memory://a/1.png") is not store_of("memory://b/1.png")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/a", {"region": "region-of-b", "access_key": None, "secret_key": None}),
        ("s3a://b/a?region=x", {"region": "x"}),
        ("s3://k:s%2F1@b/a", {"access_key": "k", "secret_key": "s/1"}),
        (
            "s3n://b/a?endpoint_override=127.0.0.1%3A9000&scheme=http",
            {"endpoint_override": "127.0.0.1:9000", "scheme": "http"},
        ),
    ],
)
def test_a_client_of_s3_has_what_the_uri_says(s3: Clients, uri: str, expected: dict) -> None:
    store_of(uri)
    (made,) = s3.made
    assert made.items() >= expected.items()
    assert made["connect_timeout"] and made["request_timeout"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AWS_REGION": "x"}, {"region": "x"}),
        ({"AWS_DEFAULT_REGION": "x"}, {"region": "x"}),
        ({"AWS_ENDPOINT_URL": "http://h:1/"}, {"scheme": "http", "endpoint_override": "h:1"}),
        ({"AWS_ENDPOINT_URL": "https://h"}, {"scheme": "https", "endpoint_override": "h"}),
        (
            {"AWS_ENDPOINT_URL_S3": "http://s3", "AWS_ENDPOINT_URL": "http://all"},
            {"scheme": "http", "endpoint_override": "s3"},
        ),
    ],
)
def test_a_client_of_s3_has_what_the_environment_says(
    s3: Clients, monkeypatch: pytest.MonkeyPatch, environment: dict, expected: dict
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store_of("s3://b/a")
    names = ("region", "scheme", "endpoint_override")
    assert {name: s3.made[0][name] for name in names if name in s3.made[0]} == expected


def test_a_uri_says_more_than_the_environment(s3: Clients, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere")
    store_of("s3://b/a?endpoint_override=h")
    assert s3.made[0]["endpoint_override"] == "h"
    assert "scheme" not in s3.made[0]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///a.png",
        "gs://",
        "s3://b/a?region=x&nope=1",
        "gs://b/a?nope=1",
        "gs://b/a?retry_limit_seconds=soon",
        "s3://b/what?.png",
        "nope://x/y",
        "fsspec+http://h/x",
        "filecache+s3://b/a",
        "github://a/b",
    ],
)
def test_a_uri_without_a_store_is_refused(uri: str) -> None:
    with pytest.raises((UnsupportedURIError, ValueError)):
        store_of(uri)
    assert not stores._stores


def test_hadoop_may_know_its_host_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Clients()
    monkeypatch.setattr(fs, "HadoopFileSystem", made)
    store_of("hdfs:///a.png")
    assert made.made == [{"arguments": ("default",)}]


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "wasb", "wasbs"])
def test_what_is_not_installed_is_named(scheme: str) -> None:
    if scheme in fsspec.available_protocols() and _is_installed("adlfs"):
        pytest.skip("it is installed")
    with pytest.raises(ImportError, match="adlfs"):
        store_of(f"{scheme}://c@account.dfs.core.windows.net/a.png")


def _is_installed(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


@pytest.fixture
def bucket(tmp_path: Path) -> stores.Store:
    """A store of Arrow's, as of S3, whose files lie in ``tmp_path / "bucket"``."""
    client = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    (tmp_path / "bucket" / "sub").mkdir(parents=True)
    return stores._ArrowStore(client, "s3://k:s@", "region=x")


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_object_is_read(bucket: stores.Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "bucket" / name).write_bytes(name.encode())
    (file,) = (e for e in bucket.entries("s3://k:s@bucket?region=x") if e.kind == "file")
    assert file.name == name
    assert file.length == len(name.encode())
    assert file.modified == (tmp_path / "bucket" / name).stat().st_mtime_ns // 1000
    assert file.path.startswith("s3://k:s@bucket/") and file.path.endswith("?region=x")
    assert bucket.read(file.path) == name.encode()
    assert bucket.entry(file.path) == file
    with bucket.open(file.path) as opened:
        assert opened.read() == name.encode()


def test_a_folder_of_objects(bucket: stores.Store) -> None:
    (sub,) = bucket.entries("s3://k:s@bucket/")
    assert (sub.path, sub.name, sub.kind) == ("s3://k:s@bucket/sub?region=x", "sub", "folder")
    assert list(bucket.entries(sub.path)) == []
    assert bucket.entry("s3://bucket/sub/") == sub
    for missing in (bucket.read, bucket.entry, lambda path: list(bucket.entries(path))):
        with pytest.raises(FileNotFoundError):
            missing("s3://bucket/nothing")


def test_the_path_of_hadoop_is_without_its_host(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fs, "HadoopFileSystem", fs.LocalFileSystem)
    (tmp_path / "a@b.png").write_bytes(b"1")
    store = stores._ArrowStore(fs.LocalFileSystem(), "hdfs://user@host:1", "")
    (file,) = store.entries(f"hdfs://user@host:1{tmp_path}")
    assert file.path == f"hdfs://user@host:1{tmp_path}/a@b.png"
    assert store.read(file.path) == b"1"


def test_local_entries(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a b.png").write_bytes(b"123")
    (tmp_path / "link.png").symlink_to("a b.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "pipe")
    store = store_of(str(tmp_path))
    found = {entry.name: entry for entry in store.entries(f"file:{tmp_path}")}
    kinds = {name: (entry.kind, entry.length) for name, entry in found.items()}
    assert kinds == {
        "sub": ("folder", 0),
        "a b.png": ("file", 3),
        "link.png": ("file", 3),
        "dangling.png": ("dangling", 0),
        "pipe": ("other", 0),
    }
    assert found["a b.png"].path == f"file:{tmp_path}/a b.png"
    assert found["a b.png"].modified == (tmp_path / "a b.png").stat().st_mtime_ns // 1000
    for entry in found.values():
        assert store.entry(entry.path) == entry
    assert store.entry(f"file://{tmp_path}/a%20b.png") == found["a b.png"]
    with store.open(f"file://{tmp_path}/a%20b.png") as file:
        assert file.read() == b"123"
    with pytest.raises(FileNotFoundError):
        store.entry(str(tmp_path / "nothing"))


def test_a_long_name_is_found_by_its_quoted_one(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120)
    path.write_bytes(b"1")
    assert store_of("x").read(path.as_uri()) == b"1"


class Forgetful(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """As most clients of fsspec do, it keeps what it listed, and leaves the host out of names."""

    protocol = "forgetful"
    names: list[str] = []

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = [
                {"name": f"{path}/{name}", "type": "file", "size": 1, "mtime": 1.5}
                for name in self.names
            ]
        return self.dircache[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        host_and_path = path.partition("://")[2]
        plain = "/" + host_and_path.partition("/")[2] if host_and_path else path
        return plain.rstrip("/")

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        return path.encode()


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> type[Forgetful]:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    monkeypatch.setattr(Forgetful, "names", ["a.png"])
    return Forgetful


def test_an_entry_of_fsspec_keeps_the_host(forgetful: type[Forgetful]) -> None:
    folder = "forgetful://user@host/photos"
    store: Any = store_of(folder)
    (file,) = store.entries(f"{folder}/")
    assert file == (f"{folder}/a.png", "a.png", "file", 1, 1_500_000)
    assert store.entry(file.path) == file
    assert store.read(file.path) == b"/photos/a.png"


def test_fsspec_is_asked_again(forgetful: type[Forgetful]) -> None:
    """The driver lives long: a second extraction must see what is new."""
    folder = "forgetful://host/photos"
    assert len(list(store_of(folder).entries(folder))) == 1
    forgetful.names.append("b.png")
    assert len(list(store_of(folder).entries(folder))) == 2
    assert store_of(folder).entry(f"{folder}/b.png").name == "b.png"


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_a_client_without_credentials_is_not_the_paths_fault(
    forgetful: type[Forgetful], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Azure's raises ``ValueError`` where there is no account, others if a key file is gone."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise error("no account")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(ConnectionError, match="forgetful://: no account"):
        store_of("forgetful://host/a.png")


def test_memory_of_fsspec_is_listed_and_read() -> None:
    folder = "memory://photos/2024"
    client = fsspec.filesystem("memory")
    client.pipe({f"{folder}/a b.png": b"1", f"{folder}/sub/c.png": b"22"})
    try:
        store = store_of(folder)
        found = sorted(store.entries(folder))
        assert [(e.path, e.kind, e.length) for e in found] == [
            (f"{folder}/a b.png", "file", 1),
            (f"{folder}/sub", "folder", 0),
        ]
        assert store.read(found[0].path) == b"1"
        with store.open(f"{folder}/sub/c.png") as file:
            assert file.read() == b"22"
    finally:
        client.rm(folder, recursive=True)


def test_a_web_page_of_links_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name in ("photos/a b.png", "photos/sub/c.png"):
        (tmp_path / name).write_bytes(name.encode())
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            folder = f"http://127.0.0.1:{server.server_port}/photos/"
            store = store_of(folder)
            assert store.entry(folder).kind == "folder"
            found = {entry.path: entry for entry in store.entries(folder)}
            assert {path: entry.kind for path, entry in found.items() if path != folder} == {
                f"{folder}a%20b.png": "file",
                f"{folder}sub/": "folder",
            }
            assert store.read(f"{folder}a%20b.png") == b"photos/a b.png"
            with pytest.raises(FileNotFoundError):
                store.entry(f"{folder}nothing.png")
        finally:
            server.shutdown()
            thread.join(30)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass
