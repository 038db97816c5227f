"""What paths in the input column are read as, and where they may lead."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imagevec import ImageError, ImageVectorizer, MissingExtraError, OptionError, ReadError
from imagevec.images import reading
from imagevec.images.prepare import load
from imagevec.images.reading import read, read_ahead
from imagevec.images.values import Value
from imagevec.spec import Preprocessing
from imagevec.storage import retry
from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.retry import retried
from imagevec.storage.stores import SettingsError, Stream
from tests.helpers.images import MODES_OF_FORMAT, encode, photo
from tests.helpers.pipeline import execution_options, run_python, small_row

PNG = encode(photo())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """``open/a.png``, ``closed/b.png``, and links from the one to the other."""
    for name in ("open/a.png", "closed/b.png", "open-too/c.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "closed" / "b.png")
    (tmp_path / "open" / "linked").symlink_to(tmp_path / "closed")
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "file:", "file://"])
def test_what_is_under_a_root_is_read(folders: Path, prefix: str) -> None:
    for root in (f"{folders}/open", f"file:{folders}/open/", f"file://{folders}"):
        assert read(f"{prefix}{folders}/open/a.png", [root]) == PNG


@pytest.mark.parametrize(
    "path",
    [
        "closed/b.png",
        "open/../closed/b.png",
        "open/link.png",
        "open/linked/b.png",
        "open-too/c.png",
    ],
)
@pytest.mark.parametrize("prefix", ["", "file:", "file://"])
def test_what_is_outside_is_forbidden(folders: Path, path: str, prefix: str) -> None:
    with pytest.raises(ImageError, match="forbidden_path"):
        read(f"{prefix}{folders}/{path}", [f"{folders}/open", "s3://bucket"])


@pytest.mark.parametrize(
    "uri",
    ["s3://other/a.png", "s3://bucket-too/a.png", "s3://bucket/../a.png", "gs://bucket/a.png"],
)
def test_a_uri_outside_is_forbidden_without_a_connection(uri: str) -> None:
    with pytest.raises(ImageError, match="forbidden_path"):
        read(uri, ["s3://bucket"])


def test_it_is_an_error_row(folders: Path) -> None:
    row = small_row(f"{folders}/closed/b.png", allowed_roots=[f"{folders}/open"])
    assert row["error"].startswith("forbidden_path: ")
    assert small_row(f"{folders}/open/a.png", allowed_roots=[f"{folders}/open"])["error"] is None


def test_a_relative_root_is_refused() -> None:
    with pytest.raises(OptionError, match="use an absolute path"):
        ImageVectorizer(model="alexnet", weights="random", allowed_roots="photos")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        with pytest.raises(ImageError, match="not a file"):
            read(path)


def test_spaces_and_percent_signs_are_read_as_spark_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    (tmp_path / "100%25.png").write_bytes(PNG + b"1")
    (tmp_path / "100%.png").write_bytes(PNG + b"2")
    assert read(f"file:{tmp_path}/a b.png") == PNG
    assert read(f"file://{tmp_path}/a%20b.png") == PNG
    assert read(f"file:{tmp_path}/100%25.png") == PNG + b"1"
    assert read(f"{tmp_path}/100%.png") == PNG + b"2"


NAMES = ["a.png", "a b.png", "a:b.png", "ä.png", "a#b.png", "a?b.png", "100%.png", "a+b.png"]


FORMS: dict[str, Callable[[Path], str]] = {
    "path": str,
    "uri": lambda path: path.as_uri(),  # file:///, escaped: input_file_name(), image.origin
    "file:": lambda path: f"file:{path}",  # not escaped: the path of binaryFile
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_path_is_read_in_every_form_that_spark_has(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / name
    path.write_bytes(PNG)
    value = FORMS[form](path)
    assert read(value) == PNG
    assert small_row(value)["width"] == 80


def test_a_relative_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(PNG)
    assert read("a.png") == PNG


@pytest.mark.parametrize(
    "path",
    ["", "/no/such/file.png", ".", "/", "a\x00b", "x" * 5000, "nope:x", "foo://x/y", "C:\\a.png"],
    ids=lambda path: ascii(path)[:20],
)
def test_a_path_that_cannot_be_read_says_so(path: str) -> None:
    error = small_row(path)["error"]
    assert error.startswith("unreadable_path: ")
    assert path in error


def test_a_file_that_is_no_image_is_told_from_one_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    assert small_row(str(tmp_path / "a.txt"))["error"].startswith("unsupported_format: ")


def test_only_the_head_of_a_large_video_is_read(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    with video.open("wb") as file:
        file.write(b"\x00\x00\x00\x20ftypisom")
        file.truncate(6 << 30)  # a hole, which would be read as zeros
    with pytest.raises(ImageError, match="unsupported_format"):
        read(str(video))
    with pytest.raises(ImageError, match=r"too_large: \d+ bytes, max_bytes=500000000"):
        video.write_bytes(PNG)
        os.truncate(video, 6 << 30)
        read(str(video))


def test_max_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    path = str(tmp_path / "a.png")
    assert read(path, max_bytes=len(PNG)) == PNG
    with pytest.raises(ImageError, match="too_large"):
        read(path, max_bytes=len(PNG) - 1)
    for value in (path, PNG):
        assert small_row(value, max_bytes=len(PNG))["error"] is None
        assert (
            small_row(value, max_bytes=100)["error"]
            == f"too_large: {len(PNG)} bytes, max_bytes=100"
        )


def test_length_that_a_store_does_not_report_is_limited(store: FakeStore) -> None:
    store.has_length = False
    assert read("s3://b/a.png", max_bytes=len(PNG)) == PNG
    with pytest.raises(ImageError, match="too_large"):
        read("s3://b/a.png", max_bytes=len(PNG) - 1)
    assert len(store.reads) == 2


@pytest.mark.parametrize("has_length", [True, False])
def test_long_files_are_read_in_order_when_they_are_needed(
    store: FakeStore, has_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.has_length = has_length
    monkeypatch.setattr(reading, "_MAX_BYTES_AHEAD", len(PNG) - 1)
    values = read_ahead(Value(f"s3://b/{number}.png", str(number)) for number in range(20))
    first = next(values)
    assert (first.data, first.path) == (PNG, "0")
    assert [(value.data, value.path) for value in values] == [
        (PNG, str(number)) for number in range(1, 20)
    ]


@pytest.mark.parametrize("name", [*MODES_OF_FORMAT])
def test_head_of_every_format_is_accepted(tmp_path: Path, name: str) -> None:
    data = encode(photo(), name)
    (tmp_path / "image").write_bytes(data)
    assert read(str(tmp_path / "image"), formats=[name]) == data
    others = [other for other in MODES_OF_FORMAT if other != name]
    with pytest.raises(ImageError, match=f"unsupported_format: {name}"):
        read(str(tmp_path / "image"), formats=others)


@given(st.text(max_size=60).filter(lambda text: "://" not in text))
def test_any_text_is_a_path_or_an_image_error(text: str) -> None:
    code, _, _ = small_row(text)["error"].partition(":")
    assert code in ("unreadable_path", "unsupported_format", "empty")


def test_many_paths_stay_in_order(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(50)]
    for level, path in enumerate(paths):
        Image.new("RGB", (4, 4), (level, 0, 0)).save(path)
    values = [Value(data, data) for path in paths for data in (path, None, "no such")]
    contents = list(read_ahead(values))
    assert [type(content.data) for content in contents] == [bytes, type(None), ImageError] * 50
    assert [content.path for content in contents] == [value.path for value in values]
    images = [load(content, execution_options(), Preprocessing()) for content in contents[::3]]
    assert [int(image.pixels[0, 0, 0]) for image in images] == list(range(50))


@pytest.mark.parametrize(
    "uri",
    [
        "hdfs://host/open/../closed/a.png",
        "hdfs://host/open/%2e%2E/closed/a.png",
        "hdfs://host/open/a.png?user=root",
        "s3://bucket/a.png?endpoint_override=elsewhere",
        "s3://key:secret@bucket/a.png",
        "https://host.evil/a.png",
        "https://host@evil/a.png",
    ],
)
def test_a_uri_that_leads_out_is_forbidden(uri: str) -> None:
    with pytest.raises(ImageError, match="forbidden_path"):
        read(uri, ["hdfs://host/open", "s3://bucket", "https://host"])


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("memory://bucket/ä b.png", "memory://bucket/"),
        ("memory://bucket/ä b/c.png", "memory://bucket/ä b"),
        ("memory://bucket/a@b.png", "memory://"),
        ("memory://bucket/a..b.png", "memory://bucket"),
        ("https://host/a?size=1/../2", "https://host"),
        ("s3://bucket/a.png?region=x", "s3://bucket?region=x"),
        ("s3://bucket/a.png?region=x", "s3://"),
    ],
)
def test_a_uri_under_a_root_is_read(store: FakeStore, uri: str, root: str) -> None:
    assert read(uri, [root]) == PNG


class FakeStore:
    """A store, and a clock for it: what happens at each read, and the pauses between them."""

    def __init__(self) -> None:
        self.outcomes: list[bytes | Exception] = []
        self.reads: list[str] = []
        self.pauses: list[float] = []
        self.now = 1000.0
        self.has_length = True

    @contextlib.contextmanager
    def stream(self, location: Location, roots: tuple[Location, ...]) -> Iterator[Stream]:
        self.reads.append(str(location))
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else (self.outcomes or [PNG])[0]
        if isinstance(outcome, Exception):
            raise outcome
        yield Stream(io.BytesIO(outcome).read, len(outcome) if self.has_length else None)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    fake = FakeStore()
    monkeypatch.setattr(reading, "store_of", lambda path: fake)
    monkeypatch.setattr(retry, "time", fake)
    return fake


PATHS = ["s3://bucket/a.png", "/mnt/nfs/a.png"]

MAY_PASS = [
    OSError("AWS Error SLOW_DOWN (HTTP status 503)"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("timed out"),
    RuntimeError("of a library"),
    TypeError("of a library"),
    json.JSONDecodeError("Expecting value", "", 0),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ssl.SSLCertVerificationError("certificate has expired"),  # a ValueError, too
]

OF_THE_PATH = [
    FileNotFoundError("no such key"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    IsADirectoryError(errno.EISDIR, "Is a directory"),
    NotADirectoryError(errno.ENOTDIR, "Not a directory"),
    OSError(errno.ENAMETOOLONG, "File name too long"),
    OSError(errno.ELOOP, "Too many levels of symbolic links"),
    ValueError("embedded null byte"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    UnsupportedURIError("nope:// is not supported"),
]

AT_ONCE = [
    PermissionError(errno.EACCES, "Permission denied"),
    ImportError("there is no boto3"),
    SettingsError("no bucket"),
    MissingExtraError("fsspec", "fsspec"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", MAY_PASS, ids=repr)
def test_what_may_pass_is_tried_again(store: FakeStore, path: str, error: Exception) -> None:
    store.outcomes = [error, error, PNG]
    assert read(path) == PNG
    assert store.reads == [path] * 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", MAY_PASS, ids=repr)
def test_in_the_end_it_fails(store: FakeStore, path: str, error: Exception) -> None:
    store.outcomes = [error]
    with pytest.raises(ReadError, match=re.escape(path)) as failed:
        read(path, timeout_seconds=60)
    assert str(error) in str(failed.value)
    assert f"tries: {len(store.reads)}" in str(failed.value)
    assert failed.value.__cause__ is error
    assert sum(store.pauses) < 60
    assert len(store.reads) == len(store.pauses) + 1 > 5


def test_an_error_without_a_text_is_named(store: FakeStore) -> None:
    store.outcomes = [TimeoutError()]
    with pytest.raises(ReadError, match="TimeoutError"):
        read(PATHS[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", OF_THE_PATH, ids=repr)
def test_what_is_of_the_path_is_an_image_error_at_once(
    store: FakeStore, path: str, error: Exception
) -> None:
    store.outcomes = [error, PNG]
    with pytest.raises(ImageError, match="unreadable_path") as refused:
        read(path)
    assert path in str(refused.value)
    assert (len(store.reads), store.pauses) == (1, [])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", AT_ONCE, ids=repr)
def test_what_a_person_must_change_fails_at_once(
    store: FakeStore, path: str, error: Exception
) -> None:
    store.outcomes = [error, PNG]
    with pytest.raises(ReadError, match=re.escape(path)):
        read(path)
    assert (len(store.reads), store.pauses) == (1, [])


def test_pauses_grow_up_to_a_limit(store: FakeStore) -> None:
    store.outcomes = [OSError("down")]
    with pytest.raises(ReadError):
        read(PATHS[0], timeout_seconds=300)
    planned = [min(0.2 * 2**number, 10) for number in range(len(store.pauses))]
    for pause, about in zip(store.pauses, planned, strict=True):
        assert about / 2 <= pause <= about * 1.5
    assert len(set(store.pauses)) == len(store.pauses)  # not all workers at the same time
    assert max(planned) == 10


def test_a_path_that_fails_does_not_stop_the_others_that_do_not_exist(store: FakeStore) -> None:
    store.outcomes = [FileNotFoundError("nothing"), PNG, OSError("down"), PNG]
    values = [Value("s3://b/1"), Value(None), Value("s3://b/2"), Value("s3://b/3")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "_READ_THREADS", 1)  # so that the outcomes are in order
        found = [value.data for value in read_ahead(values)]
    assert isinstance(found[0], ImageError)
    assert found[1:] == [None, PNG, PNG]


def test_a_read_error_ends_the_stream_of_values(store: FakeStore) -> None:
    store.outcomes = [OSError("down")]
    with pytest.raises(ReadError, match="s3://b/1.*down"):
        list(read_ahead([Value(b"1"), Value("s3://b/1")], timeout_seconds=5))


def test_what_does_not_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    ended = threading.Event()

    @contextlib.contextmanager
    def hang(location: Location, roots: tuple[Location, ...]) -> Iterator[Stream]:
        answer.wait(60)
        ended.set()
        yield Stream(io.BytesIO(PNG).read, len(PNG))

    monkeypatch.setattr(reading, "store_of", lambda location: SimpleNamespace(stream=hang))
    with pytest.raises(ReadError, match=r"s3://bucket/a\.png cannot be read: no answer") as failed:
        read("s3://bucket/a.png", timeout_seconds=0.2)
    assert isinstance(failed.value.__cause__, TimeoutError)
    assert not ended.is_set()
    answer.set()
    assert ended.wait(60)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_permission_fails(folders: Path) -> None:
    (folders / "open" / "a.png").chmod(0)
    (folders / "closed").chmod(0)
    try:
        for name in ("open/a.png", "closed/b.png", "closed/b%20.png"):
            with pytest.raises(ReadError, match="Permission denied"):
                read(f"{folders}/{name}")
    finally:
        (folders / "closed").chmod(0o700)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_looked_at_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also where the name, unquoted, would be that of a file that is not there."""
    path = str(tmp_path / "a%20b.png")
    Path(path).write_bytes(PNG)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ReadError, match=re.escape(os.strerror(number))):
        read(path, timeout_seconds=0.1)


class Web(BaseHTTPRequestHandler):
    """Answers with the status that the path begins with; ``/busy`` is busy twice."""

    asked: Counter[str]

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path == "/busy":
            status = 503 if self.asked["/busy"] <= 2 else 200
        else:
            status = int(self.path[1:4])
        body = PNG if status == 200 else b"no"
        self.send_response(status)
        cut_off = "cut" in self.path and self.asked[self.path] == 1
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:10] if cut_off else body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, Counter[str]]]:
    """The address of a web server, and how often each path was asked for."""
    asked: Counter[str] = Counter()
    handler = type("Handler", (Web,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_a_web_server_is_read(web: tuple[str, Counter[str]]) -> None:
    address, asked = web
    assert read(f"{address}/200/a b.png?size=1") == PNG
    assert small_row(f"{address}/200.png")["width"] == 80
    assert read(f"{address}/busy") == PNG
    assert asked["/busy"] == 3
    assert read(f"{address}/200-cut-off") == PNG
    assert asked["/200-cut-off"] == 2


@pytest.mark.parametrize("status", [404, 410])
def test_what_a_web_server_does_not_have(web: tuple[str, Counter[str]], status: int) -> None:
    address, asked = web
    with pytest.raises(ImageError, match="unreadable_path"):
        read(f"{address}/{status}")
    assert asked == {f"/{status}": 1}


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_a_web_server_refuses(web: tuple[str, Counter[str]], status: int) -> None:
    address, asked = web
    with pytest.raises(ReadError, match=f"{address}/{status}.*{status}"):
        read(f"{address}/{status}", timeout_seconds=0.5)
    assert asked[f"/{status}"] >= 1


def closed_port() -> int:
    """One on loopback where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_a_web_server_that_is_not_there_fails() -> None:
    uri = f"http://127.0.0.1:{closed_port()}/a.png"
    with pytest.raises(ReadError, match=f"{uri}.*connect"):
        read(uri, timeout_seconds=0.5)


@pytest.mark.parametrize(
    "uri",
    ["http://[::1/x", "http://h:99999999/x", "http://h:port/x", "https://", "s3:///x", "gs://"]
    + ["nope://x/y", "fsspec+http://h/x", "s3://bucket/x?region=x&nope=1", "gs://bucket/x?nope=1"],
)
def test_a_uri_that_is_malformed_is_an_image_error(uri: str) -> None:
    error = small_row(uri)["error"]
    assert error.startswith("unreadable_path: ") and uri in error


UNREACHABLE = {
    "abfss://c@account.dfs.core.windows.net/x.png": "",
    "hf://datasets/x/y.png": "",
    "gs://bucket/x.png": "",
    "s3://bucket/x.png": "",
    "s3://bucket/x.png?region=x&scheme=http&endpoint_override=127.0.0.1:{port}": "",
    "hdfs://127.0.0.1:{port}/x.png": "",
}


@pytest.mark.parametrize("uri", UNREACHABLE, ids=lambda uri: uri[:15])
def test_no_path_ends_the_process(tmp_path: Path, uri: str) -> None:
    """In a process of its own, which reads a file afterwards, and ends as it should."""
    (tmp_path / "a.png").write_bytes(PNG)
    path = uri.format(port=closed_port())
    code = f"""
from imagevec import ReadError
from imagevec.images.reading import read
try:
    read({path!r}, timeout_seconds=1)
except ReadError as error:
    print(error)
print(len(read({str(tmp_path / "a.png")!r})))
"""
    environment = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "GCE_METADATA_HOST": f"127.0.0.1:{closed_port()}",
        # Never the network.
        "HTTP_PROXY": f"http://127.0.0.1:{closed_port()}",
        "HTTPS_PROXY": f"http://127.0.0.1:{closed_port()}",
    }
    message, length = run_python(code, **environment).strip().rsplit("\n", 1)
    assert message.startswith(f"{path} cannot be read: ")
    assert UNREACHABLE[uri] in message
    assert int(length) == len(PNG)


def test_what_a_store_last_said_is_reported() -> None:
    """And not that the time was up while it was asked again."""
    asked = []

    def busy_then_silent() -> bytes:
        asked.append(1)
        if len(asked) > 1:
            threading.Event().wait(5)
        raise OSError("SLOW_DOWN")

    with pytest.raises(ReadError, match="x.png cannot be read: SLOW_DOWN") as raised:
        retried(Location.parse("s3://bucket/x.png"), busy_then_silent, timeout_seconds=0.8)
    assert isinstance(raised.value.__cause__, OSError)
    assert len(asked) > 1
