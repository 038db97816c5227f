"""Web servers: redirects, listings, ranges and statuses, on a server on loopback."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from imagevec.errors import ImageError, ReadError
from imagevec.images.reading import read
from imagevec.storage.location import Location
from imagevec.storage.web import WebStore
from tests.helpers.images import encode, photo

PNG = encode(photo())
CONTENT = bytes(range(256)) * 10_000


class Site(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if self.path.startswith("/to/"):
            self.answer(302, b"moved", Location=self.path.removeprefix("/to/"))
        elif self.path == "/loop":
            self.answer(301, b"", Location="/loop")
        elif self.path.startswith("/ranges"):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            status = 206 if start else 200
            self.answer(status, CONTENT[start:])
        elif self.path.startswith("/plain"):
            self.answer(200, CONTENT)
        elif self.path.startswith("/status/"):
            self.answer(int(self.path.rpartition("/")[2]), b"no")
        elif self.path.startswith("/endless/"):
            self.endless(int(self.path.rpartition("/")[2]))
        elif self.path == "/apache/":
            self.answer(200, APACHE)
        else:
            self.answer(200, PNG)

    def do_HEAD(self) -> None:
        if self.path.startswith("/presigned"):
            self.answer(403, b"")
        else:
            self.do_GET()

    def endless(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Location", "/a.png")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client leaves
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


# As Apache's mod_autoindex writes it, with links that are no files of the folder.
APACHE = b"""<html><h1>Index of /apache</h1><table>
<tr><th><a href="?C=N;O=D">Name</a></th><th><a href="?C=M;O=A">Last modified</a></th></tr>
<tr><td><a href="/">Parent Directory</a></td></tr>
<tr><td><a href="a%20b.png">a b.png</a></td></tr>
<tr><td><a href="a%20b.png#top">again</a></td></tr>
<tr><td><A HREF='sub/'>sub/</A></td></tr>
<tr><td><a href="sub/deep.png">deeper</a></td></tr>
<tr><td><a href="/apache/absolute.png">absolute</a></td></tr>
<tr><td><a href="http://elsewhere/x.png">elsewhere</a></td></tr>
<tr><td><a href="mailto:someone">mail</a><a href="http://[bad">bad</a><a>none</a></td></tr>
</table></html>"""


@pytest.fixture
def site() -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """The address of a server, and the requests that it has seen."""
    seen: list[tuple[str, dict[str, str]]] = []
    handler = type("Handler", (Site,), {"seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_redirect_is_followed(site: Any) -> None:
    address, seen = site
    assert read(f"{address}/to//a.png") == PNG
    assert read(f"{address}/to/{address}/a.png", [address]) == PNG
    assert [path for path, _ in seen][:2] == ["/to//a.png", "/a.png"]


@pytest.mark.parametrize("target", ["/private/a.png", "{local}/a.png"])
def test_redirect_out_of_the_roots_is_forbidden(site: Any, target: str) -> None:
    address, seen = site
    target = target.replace("{local}", address.replace("127.0.0.1", "localhost"))
    with pytest.raises(ImageError, match="forbidden_path"):
        read(f"{address}/to/{target}", [f"{address}/to"])
    assert len(seen) == 1


def test_redirect_through_a_forbidden_address_is_not_requested(site: Any) -> None:
    address, seen = site
    with pytest.raises(ImageError, match="forbidden_path"):
        read(f"{address}/to//out/to/{address}/to/a.png", [f"{address}/to"])
    assert len(seen) == 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://h/a.png", "s3://b/a.png"])
def test_redirect_to_another_scheme_is_an_image_error(site: Any, target: str) -> None:
    with pytest.raises(ImageError, match="is redirected to"):
        read(f"{site[0]}/to/{target}")


def test_endless_redirects_are_an_image_error(site: Any) -> None:
    address, seen = site
    with pytest.raises(ImageError, match="redirected more than 10 times"):
        read(f"{address}/loop")
    assert len(seen) == 11


def test_password_is_sent_only_to_its_host(site: Any) -> None:
    address, seen = site
    with_user = address.replace("//", "//me:s%20s@")
    assert read(f"{with_user}/to/{address}/a.png") == PNG
    assert seen[0][1]["authorization"] == "Basic bWU6cyBz"
    assert "authorization" not in seen[1][1]


def test_query_is_sent_as_written(site: Any) -> None:
    address, seen = site
    read(f"{address}/a%2Fb+c.png?x=a%2Fb+c&y=%C3%A4")
    assert seen[0][0] == "/a%2Fb+c.png?x=a%2Fb+c&y=%C3%A4"


@pytest.mark.parametrize("status", [404, 410])
def test_missing_page_is_an_image_error(site: Any, status: int) -> None:
    with pytest.raises(ImageError, match=f"unreadable_path.*{status}"):
        read(f"{site[0]}/status/{status}")
    assert len(site[1]) == 1


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (403, 1), (429, 2), (500, 2), (503, 2)])
def test_refusal_is_a_read_error(site: Any, status: int, tries: int) -> None:
    with pytest.raises(ReadError, match=f"{status}"):
        read(f"{site[0]}/status/{status}", timeout_seconds=0.7)
    assert (len(site[1]) == 1) == (tries == 1)


@pytest.mark.parametrize("path", ["ranges", "plain"])
def test_opened_file_seeks(site: Any, path: str) -> None:
    with WebStore().open(Location.parse(f"{site[0]}/{path}")) as file:
        assert file.read(3) == CONTENT[:3]
        for position in (2_000_000, 10, 1_500_000, 2_559_990, 0):
            file.seek(position)
            assert file.read(100) == CONTENT[position : position + 100]
        file.seek(-5, 2)
        assert file.read() == CONTENT[-5:]


def test_only_the_head_of_another_file_is_read(site: Any) -> None:
    with pytest.raises(ImageError, match="unsupported_format"):
        read(f"{site[0]}/plain")


def test_index_of_apache(site: Any) -> None:
    folder = f"{site[0]}/apache/"
    entries = list(WebStore().entries(Location.parse(folder)))
    assert [(entry.path, entry.name, entry.kind) for entry in entries] == [
        (f"{folder}a%20b.png", "a%20b.png", "file"),
        (f"{folder}sub/", "sub", "folder"),
        (f"{folder}absolute.png", "absolute.png", "file"),
    ]


def test_entry_has_length_and_time(site: Any) -> None:
    store = WebStore()
    entry = store.entry(Location.parse(f"{site[0]}/plain.png?x=1"))
    assert (entry.name, entry.kind, entry.length) == ("plain.png", "file", len(CONTENT))
    assert entry.modified == 1_445_412_480_000_000
    assert store.entry(Location.parse(f"{site[0]}/apache/")).kind == "folder"
    assert store.entry(Location.parse(f"{site[0]}/presigned.png")).length == len(PNG)
    with pytest.raises(FileNotFoundError):
        store.entry(Location.parse(f"{site[0]}/status/404"))


def test_page_of_a_folder_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name in ("photos/a b.png", "photos/sub/c.png"):
        (tmp_path / name).write_bytes(PNG)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            folder = f"http://127.0.0.1:{server.server_port}/photos/"
            entries = WebStore().entries(Location.parse(folder))
            assert {entry.path: entry.kind for entry in entries} == {
                f"{folder}a%20b.png": "file",
                f"{folder}sub/": "folder",
            }
            assert read(f"{folder}a b.png") == PNG
        finally:
            server.shutdown()
            thread.join(30)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("host", ["", "<", "a b", "=", "a,b", "`", "[::1", ":80", "user@", "a|b:1"])
def test_malformed_host_is_an_image_error(host: str) -> None:
    with pytest.raises(ImageError, match="unreadable_path"):
        read(f"http://{host}/a.png", timeout_seconds=0.1)


@pytest.mark.parametrize(
    ("status", "code"), [(200, "unsupported_format"), (404, "unreadable_path"), (302, None)]
)
def test_endless_answer_is_not_read_and_spoils_no_connection(
    site: Any, status: int, code: str | None
) -> None:
    url = f"{site[0]}/endless/{status}"
    for _ in range(2):
        if code is None:
            assert read(url, timeout_seconds=30) == PNG
        else:
            with pytest.raises(ImageError, match=code):
                read(url, timeout_seconds=30)
        assert read(f"{site[0]}/a.png", timeout_seconds=0.1) == PNG  # at once, without a retry
