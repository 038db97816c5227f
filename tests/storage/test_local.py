"""Local files: what is not a regular file is not read, and links do not lead out of the roots."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagevec.errors import ImageError
from imagevec.images.reading import read
from imagevec.storage import local
from imagevec.storage.local import LocalStore
from imagevec.storage.location import Location, resolve_roots
from tests.helpers.images import encode, photo

PNG = encode(photo())
STORE = LocalStore()


def test_entries(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a b.png").write_bytes(b"123")
    (tmp_path / "link.png").symlink_to("a b.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "pipe")
    entries = {entry.name: entry for entry in STORE.entries(Location.of(tmp_path))}
    kinds = {name: (entry.kind, entry.length) for name, entry in entries.items()}
    assert kinds == {
        "sub": ("folder", 0),
        "a b.png": ("file", 3),
        "link.png": ("file", 3),
        "dangling.png": ("dangling", 0),
        "pipe": ("other", 0),
    }
    assert entries["a b.png"].path == f"file:{tmp_path}/a b.png"
    assert entries["a b.png"].modified == (tmp_path / "a b.png").stat().st_mtime_ns // 1000
    for entry in entries.values():
        assert STORE.entry(Location.parse(entry.path)) == entry
    quoted = Location.parse(f"file://{tmp_path}/a%20b.png")
    assert STORE.entry(quoted) == entries["a b.png"]
    with STORE.open(quoted) as file:
        assert file.read() == b"123"
    with pytest.raises(FileNotFoundError):
        STORE.entry(Location.of(tmp_path / "nothing"))


def test_long_name_is_read_by_its_quoted_form(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120)
    path.write_bytes(PNG)
    assert read(path.as_uri()) == PNG


@pytest.mark.parametrize("prefix", ["", "file:", "local://", "FILE://", "Local://"])
@pytest.mark.parametrize("roots", [(), ("/",)])
def test_devices_and_pipes_are_not_read(tmp_path: Path, prefix: str, roots: tuple) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero", "/dev/stdin", tmp_path):
        with pytest.raises(ImageError, match="unreadable_path.*not a file"):
            read(f"{prefix}{path}", roots)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_link_that_is_swapped_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.png").write_bytes(PNG)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.png").write_bytes(b"secret")
    real = local.check_allowed

    def check_then_swap(location: Location, roots: tuple[Location, ...]) -> None:
        real(location, roots)
        if place == "folder":
            (tmp_path / "open").rename(tmp_path / "moved")
            (tmp_path / "open").symlink_to("closed")
        else:
            (tmp_path / "open" / "a.png").unlink()
            (tmp_path / "open" / "a.png").symlink_to("../closed/a.png")

    monkeypatch.setattr(local, "check_allowed", check_then_swap)
    with pytest.raises(ImageError, match="unreadable_path"):
        read(str(tmp_path / "open" / "a.png"), [str(tmp_path / "open")])


def test_reads_leave_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    roots = resolve_roots([str(tmp_path)])
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "none"):
        for allowed in ((), roots):
            try:
                with STORE.stream(Location.of(path), allowed) as stream:
                    assert stream.read(4) == PNG[:4]
            except OSError:
                pass
    assert len(os.listdir("/dev/fd")) == before


def test_create_has_one_winner(tmp_path: Path) -> None:
    location = Location.of(tmp_path / "locks" / "one")
    start = threading.Barrier(8)

    def attempt(number: int) -> int:
        start.wait(30)
        try:
            STORE.create(location, str(number).encode() * 1000)
        except FileExistsError:
            return -1
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(attempt, range(8)) if number >= 0]
    assert len(winners) == 1
    assert Path(location.path).read_bytes() == str(winners[0]).encode() * 1000
    assert os.listdir(tmp_path / "locks") == ["one"]
