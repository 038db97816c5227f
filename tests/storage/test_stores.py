"""One client for each place, and the stores of Hadoop and fsspec."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from imagevec.storage import hdfs, other, stores
from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.stores import Entry, SettingsError, store_of


@pytest.fixture(autouse=True)
def no_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client is left of another test, and none stays."""
    monkeypatch.setattr(stores, "_stores", type(stores._stores)())


def store(uri: str) -> Any:
    return store_of(Location.parse(uri))


class SlowClients:
    """Makes clients, and waits until it may."""

    def __init__(self) -> None:
        self.count = 0
        self.waiting = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, location: Location) -> SimpleNamespace:
        self.waiting.set()
        assert self.go_on.wait(30)
        self.count += 1
        return SimpleNamespace(location=location)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> SlowClients:
    clients = SlowClients()
    monkeypatch.setattr(hdfs, "store_of", clients)
    return clients


def test_threads_share_the_client_of_a_place(clients: SlowClients) -> None:
    clients.go_on.clear()
    uris = [f"hdfs://{host}/{number}.png" for number in range(8) for host in ("one", "two")]
    with ThreadPoolExecutor(len(uris)) as pool:
        futures = [pool.submit(store, uri) for uri in uris]
        assert clients.waiting.wait(30)
        clients.go_on.set()
        places = {id(future.result()) for future in futures}
    assert len(places) == clients.count == 2


def test_another_user_or_setting_has_another_client(clients: SlowClients) -> None:
    for uri in ("hdfs://b/a", "hdfs://u@b/a", "hdfs://b/a?user=x", "hdfs://b/a?user=y"):
        assert store(uri) is store(uri.replace("/a", "/b"))
    assert clients.count == 4


def test_slow_client_does_not_block_other_stores(clients: SlowClients) -> None:
    clients.go_on.clear()
    thread = threading.Thread(target=store, args=("hdfs://slow/a.png",))
    thread.start()
    assert clients.waiting.wait(30)
    assert store("memory://a/b.png")
    clients.go_on.set()
    thread.join(30)
    assert clients.count == 1


def test_client_that_failed_is_made_again(clients: SlowClients, monkeypatch) -> None:
    def fail(location: Location) -> None:
        raise OSError("there is no network")

    with monkeypatch.context() as patched:
        patched.setattr(hdfs, "store_of", fail)
        with pytest.raises(OSError, match="no network"):
            store("hdfs://b/a.png")
    assert store("hdfs://b/a.png")


def test_number_of_clients_is_bounded(clients: SlowClients) -> None:
    """A column of hostile paths may name any number of hosts and settings."""
    for number in range(500):
        store(f"hdfs://b/a?user={number}")
    assert len(stores._stores) == 64


def test_one_client_serves_all_web_servers() -> None:
    assert store("https://a.example/1.png") is store("https://b.example/2.png")


def test_each_account_has_its_own_client_of_fsspec() -> None:
    assert store("memory://a/1.png") is store("memory://a/2.png")
    assert store("memory://a/1.png") is not store("memory://b/1.png")


@pytest.mark.parametrize(
    "uri",
    [
        *("nope://x/y", "fsspec+http://h/x", "filecache+s3://b/a", "github://a/b"),
        *("simplecache://h/a", "blockcache://h/a", "dir://h/a", "zip://a::file:///b.zip"),
        *("git:///repository", "reference://a", "memory://a::/dev/zero", "generic://a"),
    ],
)
def test_uri_without_a_store_is_refused(uri: str) -> None:
    with pytest.raises((UnsupportedURIError, ValueError)):
        store(uri)
    assert not stores._stores


def test_wrappers_of_fsspec_are_refused() -> None:
    """They would open local files, or stores that ``allowed_roots`` does not see."""
    for protocol in fsspec.available_protocols():
        try:
            kind = fsspec.get_filesystem_class(protocol)
        except ImportError:  # the package is not installed
            continue
        parameters = {*inspect.signature(kind.__init__).parameters}
        is_local = issubclass(kind, LocalFileSystem)
        is_uri = "_" not in protocol  # else no URI has this scheme
        if is_uri and (is_local or {"fs", "fo", "target_protocol"} & parameters):
            assert protocol in other._REFUSED


def test_host_of_hdfs_may_come_from_settings_of_hadoop(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(fs, "HadoopFileSystem", lambda host: made.append(host))
    store("hdfs:///a.png")
    assert made == ["default"]


@pytest.mark.parametrize("name", ["a@b.png", "a b.png", "100%.png", "100%25.png", "ä#.png", "a?b"])
def test_hdfs_lists_what_it_reads(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"1")
    (tmp_path / "sub").mkdir()
    folder = Location.parse(f"hdfs://user@host:1{tmp_path}")
    files = hdfs.HadoopStore(fs.LocalFileSystem())
    entries = {entry.name: entry for entry in files.entries(folder)}
    assert entries["sub"].kind == "folder"
    place = Location.parse(entries[name].path)
    assert (place.host, entries[name].length) == ("user@host:1", 1)
    assert files.entry(place) == entries[name]
    with files.stream(place) as stream:
        assert (stream.length, stream.read(9)) == (1, b"1")
    for missing in (files.entry, files.open):
        with pytest.raises(FileNotFoundError):
            missing(folder.sibling(f"{tmp_path}/none"))


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


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> type[Forgetful]:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    monkeypatch.setattr(Forgetful, "names", ["a.png"])
    return Forgetful


def test_entry_of_fsspec_keeps_the_host(forgetful: type[Forgetful]) -> None:
    folder = Location.parse("forgetful://user@host/photos/")
    (file,) = store_of(folder).entries(folder)
    path = "forgetful://user@host/photos/a.png"
    assert file == Entry(path, "a.png", "file", 1, 1_500_000)
    assert store_of(folder).entry(Location.parse(file.path)) == file


def test_fsspec_is_asked_again(forgetful: type[Forgetful]) -> None:
    """The driver lives long: a second extraction must see what is new."""
    folder = Location.parse("forgetful://host/photos")
    assert len(list(store_of(folder).entries(folder))) == 1
    forgetful.names.append("b.png")
    assert len(list(store_of(folder).entries(folder))) == 2
    assert store_of(folder).entry(folder.sibling("/photos/b.png")).name == "b.png"


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_client_without_credentials_is_a_settings_error(
    forgetful: type[Forgetful], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error("no account")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(SettingsError, match="forgetful://: no account"):
        store("forgetful://host/a.png")


def test_memory_of_fsspec_is_listed_and_read() -> None:
    folder = Location.parse("memory://photos/2024")
    client = fsspec.filesystem("memory")
    client.pipe({f"{folder}/a b.png": b"1", f"{folder}/sub/c.png": b"22"})
    try:
        files = store_of(folder)
        entries = sorted(files.entries(folder))
        assert [(e.path, e.kind, e.length) for e in entries] == [
            (f"{folder}/a b.png", "file", 1),
            (f"{folder}/sub", "folder", 0),
        ]
        with files.stream(Location.parse(entries[0].path)) as stream:
            assert (stream.read(9), stream.length) == (b"1", 1)
        with files.open(Location.parse(f"{folder}/sub/c.png")) as file:
            assert file.read() == b"22"
    finally:
        client.rm(str(folder), recursive=True)


@pytest.mark.parametrize("uri", ["http://h/a", "memory://a/b", "hdfs://h/a"])
def test_store_without_conditional_writes_says_so(uri: str, monkeypatch) -> None:
    monkeypatch.setattr(hdfs, "store_of", lambda location: hdfs.HadoopStore(None))
    create: Callable[[Location, bytes], None] = store(uri).create
    with pytest.raises(UnsupportedURIError, match="is only read|has no conditional writes"):
        create(Location.parse(uri), b"1")
