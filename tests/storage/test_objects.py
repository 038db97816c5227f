"""Object stores: keys, errors, settings and conditional writes, on a server on loopback."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from imagevec.errors import ImageError, ReadError
from imagevec.images.reading import read
from imagevec.storage import objects, stores
from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.stores import SettingsError, store_of
from tests.helpers.images import encode, photo
from tests.helpers.object_store import TEST_KEYS, s3_server

NAMES = ["a.png", "a b.png", "a@b.png", "a:b.png", "ä.png", "a#b.png", "a?b.png", "100%.png"]
NAMES += ["100%25.png", "a+b.png", "a&b=c.png", "a[1].png", "a\\b.png"]
PNG = encode(photo())


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Any]]:
    with s3_server() as (endpoint, client):
        client.create_bucket(Bucket="photos", ACL="public-read")
        for name in NAMES:
            client.put_object(
                Bucket="photos", Key=f"2024/{name}", Body=name.encode(), ACL="public-read"
            )
        client.put_object(Bucket="photos", Key="2024/sub/", Body=b"")
        client.put_object(Bucket="photos", Key="2024/sub/b.png", Body=b"1")
        client.put_object(Bucket="photos", Key="image.png", Body=PNG, ACL="public-read")
        client.put_object(Bucket="photos", Key="large", Body=bytes(range(256)) * 20_000)
        yield endpoint, client


@pytest.fixture
def s3(server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of boto3. The environment has the endpoint, and no client of other tests."""
    monkeypatch.setattr(stores, "_stores", type(stores._stores)())
    for name, value in TEST_KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server[0])
    return server[1]


def whole(uri: str, start: int = 0) -> bytes:
    location = Location.parse(uri)
    with store_of(location).stream(location, (), start) as stream:  # type: ignore[call-arg]
        parts = []
        while part := stream.read(1000):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("uri", ["s3://photos/2024", "s3a://photos/2024/"])
def test_listed_objects_are_read(s3: Any, uri: str) -> None:
    folder = Location.parse(uri)
    entries = {entry.name: entry for entry in store_of(folder).entries(folder)}
    assert sorted(entries) == sorted([*NAMES, "sub"])
    assert entries["sub"].kind == "folder"
    for name in NAMES:
        entry = entries[name]
        assert whole(entry.path) == name.encode()
        assert entry.length == len(name.encode()) and entry.modified
        assert store_of(folder).entry(Location.parse(entry.path)) == entry


def test_entry_of_folders(s3: Any) -> None:
    for uri in ("s3://photos", "s3://photos/2024", "s3://photos/2024/sub/"):
        location = Location.parse(uri)
        assert store_of(location).entry(location).kind == "folder"
    sub = Location.parse("s3://photos/2024/sub")
    assert [entry.name for entry in store_of(sub).entries(sub)] == ["b.png"]
    with pytest.raises(FileNotFoundError):
        store_of(sub).entry(Location.parse("s3://photos/nothing"))


def test_opened_file_seeks(s3: Any) -> None:
    location = Location.parse("s3://photos/large")
    content = bytes(range(256)) * 20_000
    with store_of(location).open(location) as file:
        assert file.read(3) == content[:3]
        for position in (4_000_000, 10, 500_000, 5_119_990, 0):
            file.seek(position)
            assert file.read(100) == content[position : position + 100]
        file.seek(-5, 2)
        assert file.read() == content[-5:]
        assert file.tell() == len(content)
    assert whole("s3://photos/large", 5_000_000) == content[5_000_000:]


def test_missing_object_is_an_image_error(s3: Any) -> None:
    with pytest.raises(ImageError, match="unreadable_path: s3://photos/none.png"):
        read("s3://photos/none.png")
    assert read("s3://photos/image.png") == PNG


@pytest.mark.parametrize("name", ["a//b.png", "./a.png", "a/../b.png"])
def test_key_that_cannot_be_addressed_is_an_image_error(s3: Any, name: str) -> None:
    with pytest.raises(ImageError, match="unreadable_path"):
        read(f"s3://photos/{name}")


def test_missing_bucket_is_not_an_image_error(s3: Any) -> None:
    with pytest.raises(
        ReadError, match=r"the bucket of s3://nobody/a.png does not exist.*tries: 1"
    ):
        read("s3://nobody/a.png")


@pytest.mark.parametrize("error", [OSError("Bucket 'b' not found"), FileNotFoundError("b")])
def test_missing_bucket_without_a_region_is_not_an_image_error(
    s3: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(bucket: str) -> str:
        raise error

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(fs, "resolve_s3_region", fail)
    with pytest.raises(ReadError, match=r"the bucket 'b' does not exist.*tries: 1"):
        read("s3://b/a.png")


@pytest.mark.parametrize(
    "endpoint", ["not a url", "127.0.0.1:9000", "http://", "ftp://h", "http://h:x"]
)
def test_malformed_endpoint_is_not_an_image_error(s3: Any, monkeypatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ReadError, match="is not a URL"):
        read("s3://photos/image.png")


def test_access_key_without_secret_is_not_an_image_error(s3: Any) -> None:
    with pytest.raises(ReadError, match=r"access key without a secret.*tries: 1"):
        read("s3://KEY@photos/image.png")


class Answers(BaseHTTPRequestHandler):
    status = 403
    body = b""
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def answers(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    """A server that is no object store, as the endpoint."""
    handler = type("Handler", (Answers,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()
    thread.join(30)


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_not_retried(answers: type[Answers], status: int) -> None:
    answers.status = status
    answers.body = b"<Error><Code>AccessDenied</Code></Error>"
    with pytest.raises(ReadError, match=r"denied.*tries: 1"):
        read("s3://photos/image.png")
    assert answers.requests == 1


def test_a_404_of_another_server_says_nothing_about_the_key(answers: type[Answers]) -> None:
    answers.status, answers.body = 404, b"<html>not found</html>"
    with pytest.raises(ReadError, match="not as an object store"):
        read("s3://photos/image.png")


def test_busy_store_is_retried(answers: type[Answers]) -> None:
    answers.status = 503
    with pytest.raises(ReadError, match="503"):
        read("s3://photos/image.png", timeout_seconds=1)
    assert answers.requests > 1


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///a.png",
        "gs://",
        "s3://b ucket/a.png",
        "s3://b/a?region=x&nope=1",
        "s3://b/a?region=not%20one",
        "gs://b/a?nope=1",
        "s3://b/what?.png",
        "abfss:///a.png",
    ],
)
def test_uri_without_a_store_is_refused(s3: Any, uri: str) -> None:
    with pytest.raises((UnsupportedURIError, ValueError)):
        store_of(Location.parse(uri))
    assert not stores._stores


def made_by(monkeypatch: pytest.MonkeyPatch, uri: str) -> dict[str, Any]:
    """Returns the arguments of the client for a URI."""
    made: dict[str, Any] = {}

    def take(kind: Any, bucket: str, **given: Any) -> Any:
        made.update(given, bucket=bucket)
        return kind(bucket, **{k: v for k, v in given.items() if k != "credential_provider"})

    monkeypatch.setattr(objects, "_made", take)
    store_of(Location.parse(uri))
    return made


@pytest.mark.parametrize(
    ("uri", "environment", "expected"),
    [
        ("s3://b/a", {}, {"region": "region-of-b"}),
        ("s3a://b/a?region=x", {}, {"region": "x"}),
        ("s3://b/a", {"AWS_REGION": "x"}, {"region": "x"}),
        ("s3://b/a", {"AWS_DEFAULT_REGION": "x"}, {"region": "x"}),
        ("s3://k:s%2F1@b/a", {}, {"access_key_id": "k", "secret_access_key": "s/1"}),
        ("s3://b/a?anonymous=true", {}, {"skip_signature": True}),
        (
            "s3n://b/a?endpoint_override=127.0.0.1%3A9000&scheme=http",
            {"AWS_ENDPOINT_URL": "http://elsewhere"},
            {"aws_endpoint_url_s3": "http://127.0.0.1:9000"},
        ),
        (
            "s3://b/a",
            {"AWS_ENDPOINT_URL_S3": "http://s3", "AWS_ENDPOINT_URL": "http://all"},
            {"aws_endpoint_url_s3": "http://s3", "region": "us-east-1"},
        ),
        ("gs://b/a", {}, {"bucket": "b"}),
        ("gs://anonymous@b/a", {}, {"skip_signature": True}),
        ("gcs://b/a", {"STORAGE_EMULATOR_HOST": "http://h:1"}, {"base_url": "http://h:1"}),
        (
            "abfss://c@account.dfs.core.windows.net/a",
            {},
            {"bucket": "c", "account_name": "account"},
        ),
        (
            "wasbs://c@account.blob.core.chinacloudapi.cn/a",
            {},
            {"endpoint": "https://account.blob.core.chinacloudapi.cn"},
        ),
        (
            "az://c/a",
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=x;AccountKey=eQ==;Other=1"},
            {"bucket": "c", "account_name": "x", "account_key": "eQ=="},
        ),
        (
            "abfss://c@account.dfs.core.windows.net/a",
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=account;AccountKey=eQ=="},
            {"account_name": "account", "account_key": "eQ=="},
        ),
    ],
)
def test_settings_of_a_client(
    s3: Any, monkeypatch: pytest.MonkeyPatch, uri: str, environment: dict, expected: dict
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(fs, "resolve_s3_region", lambda bucket: f"region-of-{bucket}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert made_by(monkeypatch, uri).items() >= expected.items()


def test_settings_of_another_account_are_not_used(s3: Any, monkeypatch) -> None:
    text = "AccountName=other;AccountKey=eQ==;BlobEndpoint=http://127.0.0.1:1/other"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    made = made_by(monkeypatch, "abfss://c@account.dfs.core.windows.net/a")
    assert made == {"bucket": "c", "account_name": "account"}


def test_profile_is_read_with_boto3(s3: Any, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text("[other]\naws_access_key_id = test\naws_secret_access_key = test\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert read("s3://photos/image.png") == PNG


def test_user_without_a_home_has_no_profile(s3: Any, monkeypatch) -> None:
    def nobody(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("AWS_ACCESS_KEY_ID", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert not objects._has_profile()


def test_settings_that_do_not_fit_are_named(s3: Any, monkeypatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "not base64!")
    with pytest.raises(SettingsError, match="the client cannot be created"):
        store_of(Location.parse("az://container/a.png"))


def test_create_has_one_winner(s3: Any) -> None:
    location = Location.parse("s3://photos/locks/one")

    def attempt(number: int) -> int:
        try:
            store_of(location).create(location, str(number).encode())
        except FileExistsError:
            return -1
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(attempt, range(8)) if number >= 0]
    assert len(winners) == 1
    assert whole(str(location)) == str(winners[0]).encode()


def test_listing_a_folder_with_an_unaddressable_key_names_it(s3: Any) -> None:
    s3.put_object(Bucket="photos", Key="odd//b.png", Body=b"1")
    folder = Location.parse("s3://photos/odd")
    with pytest.raises(OSError, match="s3://photos/odd.*empty path segment"):
        list(store_of(folder).entries(folder))


def test_google_cloud_storage_is_listed_and_read(s3: Any, monkeypatch) -> None:
    """Its client uses Google's XML API, which reads and lists as S3 does."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", os.environ["AWS_ENDPOINT_URL"])
    folder = Location.parse("gs://photos/2024")
    entries = {entry.name: entry for entry in store_of(folder).entries(folder)}
    assert sorted(entries) == sorted([*NAMES, "sub"])
    for name in NAMES:
        assert whole(entries[name].path) == name.encode()
    assert read("gcs://photos/image.png") == PNG
    with pytest.raises(ImageError, match="unreadable_path"):
        read("gs://photos/none.png")
    with pytest.raises(ReadError, match="does not exist"):
        read("gs://nobody/none.png")


CLOSED = {
    **TEST_KEYS,
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "STORAGE_EMULATOR_HOST": "http://127.0.0.1:1",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=eQ==;"
    "BlobEndpoint=http://127.0.0.1:1/a",
}
PARTS = [*"ab./:@?&=%#~$-_ é\0\n\ud800[]", "%2e", "%00", "region=", "endpoint_override=", "scheme="]
PARTS += ["anonymous=1", "..", ".dfs.core.windows.net", "@acct", "127.0.0.1:1", "session_token="]


@given(
    st.sampled_from(["s3", "s3a", "gs", "az", "abfss", "wasbs"]),
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
)
def test_any_uri_is_read_or_has_an_error(scheme: str, rest: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        for name, value in CLOSED.items():
            patched.setenv(name, value)
        with pytest.raises((ImageError, ReadError)):
            read(f"{scheme}://{rest}", timeout_seconds=0.01)
