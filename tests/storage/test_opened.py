"""Files that are read piece by piece from a server that breaks off."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from imagevec.errors import ReadError
from imagevec.storage import retry
from imagevec.storage.location import Location
from imagevec.storage.opened import open_file

CONTENT = random.Random(3).randbytes(3_000_000)


class Unsteady(BaseHTTPRequestHandler):
    """Of three answers, one is whole, one breaks off after 1,200,000 bytes, and one is a 503."""

    requests = 0
    is_down = False

    def do_GET(self) -> None:
        number = self.requests % 3
        type(self).requests += 1
        if self.is_down or number == 1:
            self.send_error(503)
            return
        header = self.headers.get("Range", "bytes=0-")
        start = int(header.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + 1_200_000] if number == 0 else CONTENT[start:])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Location, type[Unsteady]]]:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.001)
    handler = type("Handler", (Unsteady,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Location.parse(f"http://127.0.0.1:{server.server_port}/file"), handler
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_reads_go_on_where_the_server_breaks_off(
    unsteady: tuple[Location, type[Unsteady]],
) -> None:
    location, handler = unsteady
    with open_file(location) as file:
        assert file.read() == CONTENT
        assert file.seek(-1000, io.SEEK_END) == file.tell() == 2_999_000
        assert file.read(100) == CONTENT[-1000:-900]
        assert file.seek(10) == 10
        assert file.seek(1_500_000, io.SEEK_CUR) == 1_500_010
        assert file.read(50_000) == CONTENT[1_500_010:1_550_010]
        assert file.read(0) == b""
        file.seek(0, io.SEEK_END)
        assert file.read(1) == b""
    assert handler.requests > 5


def test_server_that_stays_down_is_a_failed_read(
    unsteady: tuple[Location, type[Unsteady]],
) -> None:
    location, handler = unsteady
    with open_file(location, timeout_seconds=0.2) as file:
        assert file.read(1000) == CONTENT[:1000]
        handler.is_down = True
        with pytest.raises(ReadError, match="cannot be read: .*503"):
            file.read()
    with pytest.raises(ReadError, match="503"):
        open_file(location, timeout_seconds=0.2)
