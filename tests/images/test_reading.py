"""Where paths in the input column may lead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagevec import ImageError, ImageVectorizer, OptionError
from imagevec.images.values import read
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import small_row

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
