"""Web servers, through urllib3. Redirects are followed one by one, and checked."""

from __future__ import annotations

import contextlib
import email.utils
import html.parser
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3

from imagevec.storage.location import Location, UnsupportedURIError, check_allowed
from imagevec.storage.stores import CONNECT_SECONDS, REQUEST_SECONDS, Entry, Stream, buffered

_MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_NOT_FOUND = (404, 410)
_DENIED = (401, 403, 407)
_HOST = re.compile(r"[\w.-]+|[0-9a-fA-F:.]+(%\w+)?")  # a name in any script, or an IPv6 address
_MAX_PAGE_BYTES = 64 << 20
_PART_BYTES = 1 << 20


def client_key(location: Location) -> tuple[str, ...]:
    return ()  # one client for all hosts


def store_of(location: Location) -> WebStore:
    return WebStore()


class WebStore:
    def __init__(self) -> None:
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=REQUEST_SECONDS)
        self._pool = urllib3.PoolManager(maxsize=16, timeout=timeout, retries=False)

    @contextlib.contextmanager
    def stream(
        self, location: Location, roots: tuple[Location, ...] = (), start: int = 0
    ) -> Iterator[Stream]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._answer("GET", location, roots, headers)
        try:
            if start and response.status != 206:  # the server ignores ranges
                _skip(response, start)
            yield Stream(response.read, response.length_remaining)
        finally:
            _end(response)

    def open(self, location: Location) -> Any:
        return buffered(lambda start: self.stream(location, start=start))

    def entry(self, location: Location) -> Entry:
        headers = self._headers(location)
        if location.path.endswith("/") or not location.path:
            return Entry(str(location), location.name or location.host, "folder")
        length = headers.get("Content-Length", "")
        return Entry(
            str(location),
            location.name,
            "file",
            int(length) if length.isdigit() else 0,
            _modified(headers.get("Last-Modified")),
        )

    def _headers(self, location: Location) -> Any:
        try:
            response = self._answer("HEAD", location)
        except (PermissionError, ConnectionError):  # presigned URLs allow only GET
            response = self._answer("GET", location)
        _end(response)
        return response.headers

    def entries(self, folder: Location) -> Iterator[Entry]:
        """Yields the links of a page that lead to files and folders directly below it."""
        with self.stream(folder, ()) as page:
            text = _whole(page).decode("utf-8", "replace")
        links = _Links()
        links.feed(text)
        base = f"{str(folder).partition('?')[0].rstrip('/')}/"
        seen = set()
        for link in links.targets:
            with contextlib.suppress(ValueError):  # a malformed address
                target = urllib.parse.urljoin(base, link)
                name = target.removeprefix(base)
                # Queries order the list; others lead elsewhere.
                is_below = target.startswith(base) and re.fullmatch(r"[^/?#]+/?", name)
                if is_below and target not in seen:
                    seen.add(target)
                    kind: Any = "folder" if name.endswith("/") else "file"
                    yield Entry(target, name.rstrip("/"), kind)

    def create(self, location: Location, data: bytes) -> None:
        raise _read_only(location)

    def write(self, location: Location, data: bytes) -> None:
        raise _read_only(location)

    def upload(self, location: Location, file: Path) -> None:
        raise _read_only(location)

    def download(self, location: Location, file: Path) -> None:
        raise _read_only(location)

    def move(self, source: Location, target: Location) -> None:
        raise _read_only(source)

    def delete(self, location: Location) -> None:
        raise _read_only(location)

    def delete_empty(self, location: Location) -> None:
        raise _read_only(location)

    def _answer(
        self,
        method: str,
        location: Location,
        roots: tuple[Location, ...] = (),
        headers: dict[str, str] | None = None,
    ) -> Any:
        """Returns the response after redirects, all under ``roots``, with its body unread."""
        url = str(location)
        _check_host(url)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._pool.request(
                method,
                _without_user(url),
                headers={**_login(url), **(headers or {})},
                redirect=False,
                preload_content=False,
            )
            if response.status not in _REDIRECTS:
                _check_status(response, url)
                return response
            _end(response)
            url = urllib.parse.urljoin(url, response.headers.get("Location", ""))
            target = Location.parse(url)
            if not target.is_web:
                raise UnsupportedURIError(f"{location} is redirected to {url}")
            check_allowed(target, roots)
            _check_host(url)
        raise UnsupportedURIError(f"{location} is redirected more than {_MAX_REDIRECTS} times")


def _read_only(location: Location) -> UnsupportedURIError:
    return UnsupportedURIError(f"{location.scheme}:// is only read")


def _end(response: Any) -> None:
    """Gives the connection back, or closes it: an unread rest, of any length, would spoil it."""
    if not response.closed:
        response.close()
    response.release_conn()


def _check_host(url: str) -> None:
    """Raises ``UnsupportedURIError`` for a host that no name server could know."""
    if not _HOST.fullmatch(urllib.parse.urlsplit(url).hostname or ""):
        raise UnsupportedURIError(f"{url} has no valid host")


def _skip(response: Any, size: int) -> None:
    while size and (skipped := response.read(min(size, _PART_BYTES))):
        size -= len(skipped)


def _check_status(response: Any, url: str) -> None:
    if response.status in (200, 206):
        return
    _end(response)
    said = f"{url}: HTTP status {response.status} {response.reason or ''}".rstrip()
    if response.status in _NOT_FOUND:
        raise FileNotFoundError(said)
    if response.status in _DENIED:
        raise PermissionError(said)
    raise ConnectionError(said)


def _login(url: str) -> dict[str, str]:
    user = urllib.parse.urlsplit(url).netloc.rpartition("@")[0]
    if not user:
        return {}
    return urllib3.make_headers(basic_auth=urllib.parse.unquote(user))


def _without_user(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _whole(stream: Stream) -> bytes:
    parts = []
    left = _MAX_PAGE_BYTES
    while left and (part := stream.read(min(left, _PART_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _modified(header: str | None) -> int | None:
    try:
        return int(email.utils.parsedate_to_datetime(header or "").timestamp() * 1e6)
    except ValueError:
        return None


class _Links(html.parser.HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]
