"""What paths in the input column are read as, and where they may lead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imagevec import ImageError, ImageVectorizer, OptionError
from imagevec.images.prepare import load
from imagevec.images.reading import read, read_ahead
from imagevec.images.values import Value
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import execution_options, small_row

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


FORMS = {
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
    images = [load(content, execution_options()) for content in contents[::3]]
    assert [int(image.pixels[0, 0, 0]) for image in images] == list(range(50))
