"""Files that are found, passed over, and named by globs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from imagevec.errors import OptionError, ReadError
from imagevec.storage import listing
from imagevec.storage.listing import Listed, check_exists, glob_parts, list_files, matcher
from imagevec.storage.location import Location

PIECES = st.one_of(
    st.sampled_from(["*", "?", "**", "[ab]", "[^a]", "[!a]", "[a-c]", "[^a-b.]", "[.]"]),
    st.sampled_from([r"\*", r"\a", r"\{"]),
    st.lists(st.sampled_from(["a", "b.", "*", "?c", ""]), min_size=1, max_size=3).map(
        lambda parts: "{" + ",".join(parts) + "}"
    ),
    st.text("abc.,-+()|$}", max_size=3),
)
PATTERNS = st.lists(PIECES, max_size=4).map("".join)


@given(PATTERNS, st.lists(st.text("abc.,*-+()|$}^", max_size=6), max_size=20))
@example("a,b", ["a,b", "a", "b"])
@example("{a,b}{,.jpg}", ["a", "b.jpg", ".jpg", "ab"])
def test_a_glob_means_what_it_means_to_hadoop(
    spark: SparkSession, pattern: str, names: list[str]
) -> None:
    jvm: Any = spark._jvm
    try:
        hadoop = jvm.org.apache.hadoop.fs.GlobPattern(pattern)
    except Py4JJavaError:
        return  # it is no pattern, there
    is_ours = matcher(pattern)
    for name in names:
        assert is_ours(name) == hadoop.matches(name), (pattern, name)


def test_what_is_special_to_python_alone_is_not() -> None:
    for members in ("a&&b", "a||b", "a~~b", "+--", "[[ab"):
        assert [name for name in "a&|~,[" if matcher(f"[{members}]")(name)]


@pytest.mark.parametrize("pattern", ["{a,b", "[z-a]", "a{b{c}"])
def test_a_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(OptionError, match="the pattern .* is not valid"):
        matcher(pattern)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg", "sub/c.png", "sub/deep/d.png", ".hidden/e.png", "_x/f.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "folder*").mkdir()
    (tmp_path / "folder*" / "g.png").touch()
    return tmp_path


def found(src: object, **options: Any) -> list[str]:
    """The paths below a source's fixed part."""
    return sorted(file.path for file in list_files(str(src), **options) if not file.skipped)


def skipped(src: object, **options: Any) -> list[tuple[str, str]]:
    return sorted(
        (Path(file.path).name, file.skipped)
        for file in list_files(str(src), **options)
        if file.skipped
    )


def under(folder: Path, *names: str) -> list[str]:
    return [f"file:{folder / name}" for name in names]


def test_a_folder(files: Path) -> None:
    assert found(files) == under(files, "a.png", "b.jpg")
    subfolders = [(name, "subfolder") for name in ("folder*", "sub")]
    assert skipped(files) == sorted([*subfolders, (".hidden", "hidden"), ("_x", "hidden")])


def test_subfolders(files: Path) -> None:
    names = ("a.png", "b.jpg", "folder*/g.png", "sub/c.png", "sub/deep/d.png")
    assert found(files, recursive=True) == under(files, *names)
    assert skipped(files, recursive=True) == [(".hidden", "hidden"), ("_x", "hidden")]


def test_names_that_match_a_pattern(files: Path) -> None:
    assert found(files, recursive=True, pattern="*.jpg") == under(files, "b.jpg")
    assert found(files, recursive=True, pattern="[cd].{png,gif}") == under(
        files, "sub/c.png", "sub/deep/d.png"
    )


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.png", ["a.png"]),
        ("*", ["a.png", "b.jpg", "folder*/g.png", "sub/c.png"]),
        ("s*/*", ["sub/c.png", "sub/deep/d.png"]),
        ("s*/*/", ["sub/c.png", "sub/deep/d.png"]),
        ("{a,b}.*", ["a.png", "b.jpg"]),
        ("s*/c.png", ["sub/c.png"]),
        ("[.]hidden", []),
        (".h*", [".hidden/e.png"]),
        ("folder*", ["folder*/g.png"]),  # there is one of that name
        ("folder*/g.png", ["folder*/g.png"]),
        (r"folder\*", ["folder*/g.png"]),
    ],
)
def test_a_glob(files: Path, glob: str, names: list[str]) -> None:
    for src in (f"{files}/{glob}", f"file:{files}/{glob}", f"file://{files}/{glob}"):
        assert found(src) == under(files, *names)


def test_a_relative_source(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert found("sub") == found("file:sub") == found("s*") == under(files, "sub/c.png")
    assert found("*.png") == under(files, "a.png")


def test_one_file(files: Path) -> None:
    (file,) = list_files(str(files / "a.png"))
    status = (files / "a.png").stat()
    assert file == Listed(f"file:{files}/a.png", 5, status.st_mtime_ns // 1000)


def test_what_is_passed_over_has_a_reason(tmp_path: Path) -> None:
    for name in (b"a:b.png", b".x.png", b"_x.png", b"\xff.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    assert found(tmp_path) == under(tmp_path, "a:b.png")
    assert skipped(tmp_path) == [
        (".x.png", "hidden"),
        ("\\udcff.png", "name is not UTF-8"),
        ("_x.png", "hidden"),
        ("gone.png", "dangling link"),
        ("pipe.png", "not a file"),
    ]
    assert skipped(tmp_path, pattern="*.jpg") == []


def test_links(tmp_path: Path) -> None:
    """They are followed, but not in circles; the same file has as many paths as lead to it."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").touch()
    (tmp_path / "a" / "b" / "to_a").symlink_to(tmp_path / "a")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "y.png").symlink_to(tmp_path / "a" / "b" / "x.png")
    names = ("a/b/x.png", "again/b/x.png", "y.png")
    assert found(tmp_path, recursive=True) == under(tmp_path, *names)


@pytest.mark.parametrize("name", ["nothing", "nothing/at/all", "no*/x", "sub/c.png/x", "sub/z*"])
def test_a_source_that_is_not_there(files: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"does not exist|matches nothing|Not a directory"):
        check_exists(str(files / name))


def test_a_source_of_no_scheme_that_is_known() -> None:
    for src in ("nope://bucket/x", "s3:///x"):
        with pytest.raises(OptionError, match="is not valid"):
            check_exists(src)


def test_a_source_that_is_there(files: Path) -> None:
    for name in ("", "a.png", "*.png", "s*/", "sub/"):
        check_exists(f"{files}/{name}")


@pytest.mark.parametrize(
    ("src", "parts"),
    [
        ("/a/b", ["/a/b"]),
        ("/a/*/b?", ["/a", "*", "b?"]),
        ("/*", ["/", "*"]),
        ("*/x/", [".", "*", "x"]),
        ("s3://bucket/a/{b,c}/d", ["s3://bucket/a", "{b,c}", "d"]),
        ("s3://bucket/a?endpoint_override=http://x", ["s3://bucket/a?endpoint_override=http://x"]),
        ("https://host/a*?b=c", ["https://host/a*?b=c"]),
    ],
)
def test_what_stands_before_a_glob(src: str, parts: list[str]) -> None:
    assert glob_parts(src) == parts


def test_a_folder_that_cannot_be_listed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> Callable[..., Any]:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ReadError, match="cannot be listed: .*Permission denied"):
        found(files)


def test_unreadable_subfolder_is_skipped(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if folder.endswith("deep"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(files, recursive=True) == sorted(
        f"file:{files}/{name}" for name in ("a.png", "b.jpg", "sub/c.png", "folder*/g.png")
    )
    assert ("deep", "unreadable subfolder") in skipped(files, recursive=True)


def test_how_long_a_store_may_take_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/listed/sub/a.png", b"x")
    given = []

    def spy(location: Location, action: Callable[[], Any], seconds: float) -> Any:
        given.append(seconds)
        return action()

    monkeypatch.setattr(listing, "retried", spy)
    (file,) = list_files("memory://listed/", recursive=True, timeout_seconds=7)
    assert file.path.endswith("sub/a.png") and file.length == 1
    assert given == [7] * 3  # the source, and two folders


def test_a_store_that_does_not_answer_is_no_missing_source() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ReadError, match="photos/ cannot be read"):
            check_exists(f"http://127.0.0.1:{taken.getsockname()[1]}/photos/", timeout_seconds=1)
