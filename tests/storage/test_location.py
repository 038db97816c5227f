"""Spellings of locations, and which root contains which location."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagevec.storage.location import ForbiddenError, Location, check_allowed, resolve_roots


@pytest.mark.parametrize(
    ("text", "scheme", "host", "path", "query"),
    [
        ("a.png", "file", "", "a.png", ""),
        ("/a b.png", "file", "", "/a b.png", ""),
        ("file:/a b", "file", "", "/a b", ""),
        ("file:///a b", "file", "", "/a b", ""),
        ("FILE:/a?b#c", "file", "", "/a?b#c", ""),
        ("local:///dev/zero", "file", "", "/dev/zero", ""),
        ("local:a.png", "file", "", "local:a.png", ""),
        ("dbfs:/photos/a.png", "file", "", "/dbfs/photos/a.png", ""),
        ("dbfs:/Volumes/main/a.png", "file", "", "/Volumes/main/a.png", ""),
        ("dbfs:///photos", "file", "", "/dbfs/photos", ""),
        ("a:b.png", "file", "", "a:b.png", ""),
        ("C:\\a.png", "file", "", "C:\\a.png", ""),
        ("1://a", "file", "", "1://a", ""),
        ("S3a://b/a.png", "s3a", "b", "/a.png", ""),
        ("s3://k:s@b/a b?region=x", "s3", "k:s@b", "/a b", "region=x"),
        ("hdfs:///a", "hdfs", "", "/a", ""),
        ("https://h:1/a?b=/c", "https", "h:1", "/a", "b=/c"),
        ("x-y+z.1://a", "x-y+z.1", "a", "", ""),
    ],
)
def test_parse(text: str, scheme: str, host: str, path: str, query: str) -> None:
    assert Location.parse(text) == Location(scheme, host, path, query)


@given(st.text(max_size=40))
def test_text_of_a_parsed_uri_is_the_uri(text: str) -> None:
    location = Location.parse(f"s3://bucket/{text}")
    again = str(location)
    assert again == f"s3://bucket/{text}" or (text.endswith("?") and again + "?" == again + "?")
    assert Location.parse(again) == location


def test_of_resolves_home_and_relative_paths(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Location.of("photos/../a").path == str(tmp_path / "a")
    assert Location.of("~/photos").path == "/home/someone/photos"
    assert Location.of(Path("a")).uri == f"file:{tmp_path}/a"
    assert str(Location.of("s3://b/~/../a")) == "s3://b/~/../a"
    assert Location.parse("~/a").path == "~/a"  # a file's name in a row


@pytest.mark.parametrize(
    ("root", "inside", "outside"),
    [
        (
            "/photos",
            ["/photos", "/photos/a/b.png"],
            ["/photos-too/a", "/", "/photo", "s3://photos"],
        ),
        (
            "s3://b",
            ["s3://b/a", "s3a://b/a", "s3n://b"],
            ["s3://b-too/a", "s3://k:s@b/a", "gs://b/a"],
        ),
        (
            "s3://b/x",
            ["s3://b/x/a", "s3://b/x"],
            ["s3://b/xy", "s3://b/x/../y", "s3://b/x/%2e%2e/y"],
        ),
        ("s3://b?region=x", ["s3://b/a?region=x"], ["s3://b/a", "s3://b/a?region=y"]),
        ("s3://", ["s3://b/a?region=y", "s3a://k:s@b/a"], ["gs://b/a", "s3://b/../a"]),
        (
            "https://h",
            ["https://h/a?b=/../c", "https://H:443/a"],
            ["http://h/a", "https://h@evil/a"],
        ),
        (
            "http://h/p",
            ["http://h/p/a"],
            ["http://h:8080/p/a", "http://h/q", "http://h/p/%2E%2e/q"],
        ),
        ("hdfs://h/open", ["hdfs://h/open/a"], ["hdfs://h/open/a?user=root", "hdfs:///open/a"]),
        ("memory://b/ä b", ["memory://b/ä b/c", "memory://b/%C3%A4%20b/c"], ["memory://b/ä"]),
    ],
)
def test_contains(root: str, inside: list[str], outside: list[str]) -> None:
    parsed = Location.parse(root)
    assert [text for text in inside if not parsed.contains(Location.parse(text))] == []
    assert [text for text in outside if parsed.contains(Location.parse(text))] == []


@given(st.lists(st.sampled_from(["a", "b", "..", "%2e%2e", ".", ""]), max_size=5))
def test_nothing_below_a_root_leads_out_of_it(parts: list[str]) -> None:
    root, text = Location.parse("s3://b/a"), f"s3://b/a/{'/'.join(parts)}"
    path = os.path.normpath("/a/" + "/".join(parts).replace("%2e", "."))
    if not (path + "/").startswith("/a/"):
        assert not root.contains(Location.parse(text))


def test_resolved_follows_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a b.png").touch()
    (tmp_path / "link").symlink_to("real")
    real = tmp_path.resolve() / "real" / "a b.png"
    assert Location.parse(f"{tmp_path}/link/a b.png").resolved().path == str(real)
    assert Location.parse(f"file:{tmp_path}/link/a%20b.png").resolved().path == str(real)


def test_check_allowed(tmp_path: Path) -> None:
    roots = resolve_roots([str(tmp_path), "s3://b"])
    check_allowed(Location.parse("s3://b/a"), roots)
    check_allowed(Location.parse("/anything"), ())
    with pytest.raises(ForbiddenError, match="not under any of allowed_roots"):
        check_allowed(Location.parse("s3://c/a"), roots)


@pytest.mark.parametrize(
    ("scheme", "store_scheme"), [("s3n", "s3"), ("gcs", "gs"), ("wasbs", "abfss"), ("hf", "hf")]
)
def test_schemes_of_the_same_store(scheme: str, store_scheme: str) -> None:
    assert Location.parse(f"{scheme}://a/b").store_scheme == store_scheme


def test_key_is_unquoted() -> None:
    assert Location.parse("s3://b/a%20b/100%25").key == "a b/100%"
    assert Location.parse("s3://b").key == ""
    assert Location.parse("s3://b/x/y.png").name == "y.png"
