from __future__ import annotations

import base64
import errno
import hashlib
import html.parser
import http.server
import itertools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from imagevec import OptionError
from imagevec.errors import IMAGE_ERROR_CODES
from imagevec.search import gallery
from imagevec.search.gallery import write_gallery
from imagevec.search.neighbours import nearest
from imagevec.spec import FeatureSpec, Preprocessing
from imagevec.table import read
from tests.helpers.images import encode, opened, photo
from tests.helpers.pipeline import run_python
from tests.helpers.tables import HOSTILE, with_column_metadata, write_images, write_table


def write_features(folder: Path, paths: list[str], features: int = 4) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(len(paths), features)).astype(np.float32)
    write_table(folder, dict(zip(paths, vectors.tolist(), strict=True)))
    return vectors


class Elements(html.parser.HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += text


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script finds."""
    return json.loads(Elements(page.read_text("utf-8")).scripts[0])


def paths_of(data: dict[str, Any]) -> list[str]:
    return [data["folder"] + image["name"] for image in data["images"]]


@pytest.fixture
def table(tmp_path):
    names = ["b/2.png", "a/1.png", "a/3.png", "c.png", "d.png"]
    paths = write_images(tmp_path / "photos", names)
    write_features(tmp_path / "features", paths)
    return tmp_path / "features"


def test_a_page_has_all_images_by_path(table, tmp_path):
    assert write_gallery(table, tmp_path / "g.html") == 5
    data = data_of(tmp_path / "g.html")
    assert data["folder"] == f"file:{tmp_path}/photos/"
    names = [image["name"] for image in data["images"]]
    assert names == ["a/1.png", "a/3.png", "b/2.png", "c.png", "d.png"]
    assert all((image["width"], image["height"]) == (80, 60) for image in data["images"])
    assert all(0 <= x <= 1 for image in data["images"] for x in image["place"])


def test_the_page_names_the_model(table, tmp_path):
    write_gallery(table, tmp_path / "g.html")
    assert data_of(tmp_path / "g.html")["madeBy"] == ""
    metadata = FeatureSpec(
        "resnet18", "random", "pooled", 4, Preprocessing(), "float32", False
    ).metadata
    made_by = "resnet18, random weights, layer pooled, 4 features, float32"
    for stored in (metadata, {"comment": json.dumps(metadata)}):
        write_table(tmp_path / "t", {"a.jpg": [1.0, 2.0, 3.0, 4.0]}, metadata=stored)
        write_gallery(tmp_path / "t", tmp_path / "g.html")
        assert data_of(tmp_path / "g.html")["madeBy"] == made_by


def test_neighbours_are_the_nearest_and_not_the_image_itself(tmp_path):
    paths = [f"/nowhere/{number:02}.jpg" for number in range(30)]
    vectors = write_features(tmp_path / "t", paths)
    write_gallery(tmp_path / "t", tmp_path / "g.html", neighbours=6)
    indices, cosines = nearest(vectors, vectors, 7)
    for index, image in enumerate(data_of(tmp_path / "g.html")["images"]):
        assert [other for other, _ in image["neighbours"]] == indices[index, 1:].tolist()
        found = [cosine for _, cosine in image["neighbours"]]
        np.testing.assert_allclose(found, cosines[index, 1:], atol=1e-4)


def test_more_copies_than_neighbours(tmp_path):
    write_table(tmp_path / "t", {f"{number}.jpg": [1.0, 0.0] for number in range(6)})
    write_gallery(tmp_path / "t", tmp_path / "g.html", neighbours=2)
    data = data_of(tmp_path / "g.html")
    for index, image in enumerate(data["images"]):
        others = [other for other, _ in image["neighbours"]]
        assert len(others) == 2
        assert index not in others
    assert data["groups"] == [[0, 1, 2, 3, 4, 5]]


def test_vectors_without_a_direction_do_no_harm(tmp_path):
    rows = {"a": [0.0, 0.0], "b": [float("nan"), 1.0], "c": [1.0, 1.0]}
    write_table(tmp_path / "t", rows)
    assert write_gallery(tmp_path / "t", tmp_path / "g.html") == 3
    data = data_of(tmp_path / "g.html")
    assert "NaN" not in json.dumps(data)
    assert [cosine for image in data["images"] for _, cosine in image["neighbours"]] == [0] * 6


def test_one_image_alone(tmp_path):
    paths = write_images(tmp_path, ["only.png"])
    write_features(tmp_path / "t", paths)
    assert write_gallery(tmp_path / "t", tmp_path / "g.html") == 1
    (image,) = data_of(tmp_path / "g.html")["images"]
    assert image["neighbours"] == []


def test_of_too_many_those_with_the_smallest_hashes_are_taken(tmp_path):
    paths = [f"/nowhere/{number:03}.jpg" for number in range(100)]
    by_hash = sorted(paths, key=lambda path: hashlib.blake2b(path.encode(), digest_size=8).digest())
    write_features(tmp_path / "t", paths)
    assert write_gallery(tmp_path / "t", tmp_path / "g.html", max_images=10) == 10
    data = data_of(tmp_path / "g.html")
    assert paths_of(data) == sorted(by_hash[:10])
    assert data["total"] == 100


def test_the_sample_does_not_depend_on_the_order_of_the_table(tmp_path):
    rows = {f"/nowhere/{number:03}.jpg": [1.0, number] for number in range(60)}
    write_table(tmp_path / "t", rows)
    shuffled = list(rows.items())
    np.random.default_rng(0).shuffle(shuffled)
    for part in range(3):
        write_table(tmp_path / "u", dict(shuffled[part::3]), part=part)
    for name in ("t", "u"):
        with mock.patch.object(read, "_ROWS", 7):
            write_gallery(tmp_path / name, tmp_path / f"{name}.html", max_images=10)
    assert (tmp_path / "t.html").read_bytes() == (tmp_path / "u.html").read_bytes()


def write_groups(folder: Path, groups: list[list[str]], metadata: Any = None) -> Path:
    """A table as ``imagevec duplicates`` writes it."""
    table = pa.table(
        {
            "path": pa.array([path for group in groups for path in group], pa.string()),
            "group": pa.array([min(group) for group in groups for _ in group], pa.string()),
        }
    )
    if metadata is not None:
        table = with_column_metadata(table, "group", metadata)
    folder.mkdir()
    parquet.write_table(table, folder / "part-0.parquet", row_group_size=5)
    return folder


def groups_of(data: dict[str, Any]) -> list[list[str]]:
    return [[paths_of(data)[index] for index in group] for group in data["groups"]]


def test_groups_are_shown_and_come_first_in_the_sample(tmp_path):
    paths = [f"/nowhere/{number:03}.jpg" for number in range(100)]
    write_features(tmp_path / "t", paths)
    groups = [["/nowhere/050.jpg", "/nowhere/003.jpg"], paths[90:93]]
    write_groups(tmp_path / "d", groups, {"min_cosine": 0.9})
    write_gallery(tmp_path / "t", tmp_path / "g.html", max_images=9, groups=tmp_path / "d")
    data = data_of(tmp_path / "g.html")
    assert groups_of(data) == [["/nowhere/003.jpg", "/nowhere/050.jpg"], paths[90:93]]
    assert (data["groupsInAll"], data["minCosine"]) == (2, 0.9)
    write_gallery(tmp_path / "t", tmp_path / "h.html", max_images=9)
    alone = data_of(tmp_path / "h.html")
    others = set(paths_of(data)) - {path for group in groups for path in group}
    assert len(paths_of(data)) == 9
    assert len(others) == 4
    assert others <= set(paths_of(alone))
    assert (alone["groupsInAll"], alone["minCosine"]) == (None, 0.95)


@pytest.mark.parametrize("max_images", [1, 2, 5, 17, 60])
def test_only_whole_groups_are_taken(tmp_path, max_images):
    paths = [f"/nowhere/{number:03}.jpg" for number in range(60)]
    write_features(tmp_path / "t", paths)
    starts = [0, 30, 32, 35, 37, 41, 43, 45, 47, 49, 51, 53, 55]  # the first is too large for most
    groups = [paths[a:b] for a, b in itertools.pairwise(starts)]
    write_groups(tmp_path / "d", groups)
    with mock.patch.object(read, "_ROWS", 3):
        write_gallery(
            tmp_path / "t", tmp_path / "g.html", max_images=max_images, groups=tmp_path / "d"
        )
    data = data_of(tmp_path / "g.html")
    shown = groups_of(data)
    assert len(paths_of(data)) == max_images
    assert all(group in groups for group in shown)
    assert data["groupsInAll"] == len(groups)
    left = max_images - sum(map(len, shown))
    assert left < 2 or len(shown) == len(groups) or left < min(map(len, groups[1:]))
    if max_images == 60:
        assert shown == groups


def test_groups_whose_images_are_not_in_the_table(tmp_path):
    write_features(tmp_path / "t", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    groups = [["a.jpg", "b.jpg", "gone.jpg"], ["c.jpg", "gone too.jpg"], ["x.jpg", "y.jpg"]]
    write_groups(tmp_path / "d", groups)
    write_gallery(tmp_path / "t", tmp_path / "g.html", groups=tmp_path / "d")
    data = data_of(tmp_path / "g.html")
    assert paths_of(data) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert groups_of(data) == [["a.jpg", "b.jpg"]]
    assert (data["groupsInAll"], data["minCosine"]) == (3, None)


def test_no_groups_at_all(tmp_path):
    """Copies on the page are no groups where the table has none."""
    write_table(tmp_path / "t", {"a.jpg": [1.0, 0.0], "b.jpg": [1.0, 0.0]})
    write_groups(tmp_path / "d", [])
    assert write_gallery(tmp_path / "t", tmp_path / "g.html", groups=tmp_path / "d") == 2
    data = data_of(tmp_path / "g.html")
    assert (data["groups"], data["groupsInAll"]) == ([], 0)


def test_a_table_that_is_not_of_groups(table, tmp_path):
    with pytest.raises(OptionError, match="no column 'group'.*`imagevec duplicates` wrote"):
        write_gallery(table, tmp_path / "g.html", groups=table)
    with pytest.raises(OptionError, match="does not exist: .*`imagevec duplicates` wrote"):
        write_gallery(table, tmp_path / "g.html", groups=tmp_path / "nowhere")
    assert not (tmp_path / "g.html").exists()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (64, 48)), ((300, 400), (48, 64)), ((900, 90), (96, 10)), ((20, 10), (20, 10))],
)
def test_thumbnails_keep_the_aspect_and_are_not_enlarged(tmp_path, size, expected):
    paths = write_images(tmp_path, ["a.png"], size)
    write_features(tmp_path / "t", paths)
    write_gallery(tmp_path / "t", tmp_path / "g.html", thumbnail_size=48)
    (image,) = data_of(tmp_path / "g.html")["images"]
    assert (image["width"], image["height"]) == size
    kind, _, encoded = image["thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    thumbnail = opened(base64.b64decode(encoded))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", expected)


@pytest.mark.parametrize("kind", ["transparent", "truncated", "named"])
def test_thumbnails_show_what_options_of_the_table_accept(tmp_path, kind):
    (path,) = write_images(tmp_path, ["a.png"])
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    data = encode(photo(60, 40))
    files = {
        "transparent": encode(image),
        "truncated": data[: len(data) // 2],
        "named": encode(photo(60, 40), "JPEG2000"),
    }
    (tmp_path / "a.png").write_bytes(files[kind])
    write_features(tmp_path / "t", [path])
    write_gallery(tmp_path / "t", tmp_path / "g.html")
    (shown,) = data_of(tmp_path / "g.html")["images"]
    thumbnail = opened(base64.b64decode(shown["thumbnail"].partition(",")[2]))
    assert np.asarray(thumbnail)[:10].mean() > 30  # not black


def test_a_file_that_has_gone_or_is_bad_has_a_placeholder(tmp_path):
    paths = write_images(tmp_path, ["a.png", "bad.png", "gone.png"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "gone.png").unlink()
    write_features(tmp_path / "t", paths)
    assert write_gallery(tmp_path / "t", tmp_path / "g.html") == 3
    good, bad, gone = data_of(tmp_path / "g.html")["images"]
    assert "problem" not in good
    assert "thumbnail" not in bad
    assert "not an image" in bad["problem"]
    assert gone["problem"] == IMAGE_ERROR_CODES["unreadable_path"]


class Unavailable(http.server.BaseHTTPRequestHandler):
    """A web server that is overloaded, and lists what was requested."""

    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested.append(self.path)
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unavailable(monkeypatch):
    monkeypatch.setattr(gallery, "_READ_SECONDS", 1)
    monkeypatch.setattr(gallery, "_THREADS", 1)
    monkeypatch.setattr(Unavailable, "requested", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_host_that_does_not_answer_is_not_tried_again(tmp_path, unavailable):
    (local,) = write_images(tmp_path, ["z.png"])
    write_features(tmp_path / "t", [f"{unavailable}/{number}.png" for number in range(9)] + [local])
    assert write_gallery(tmp_path / "t", tmp_path / "g.html") == 10
    assert set(Unavailable.requested) <= {"/0.png"}
    images = {image["name"]: image for image in data_of(tmp_path / "g.html")["images"]}
    assert "thumbnail" in images.pop(local)
    assert {image["problem"] for image in images.values()} == {"the file cannot be read"}


def test_file_without_permission_does_not_hide_others(tmp_path, monkeypatch):
    paths = write_images(tmp_path, ["a.png", "b.png"])
    write_features(tmp_path / "t", paths)
    original = os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(gallery, "_THREADS", 1)
    assert write_gallery(tmp_path / "t", tmp_path / "g.html") == 2
    bad, good = data_of(tmp_path / "g.html")["images"]
    assert bad["problem"] == "the file cannot be read"
    assert "thumbnail" in good


def test_images_outside_allowed_roots_are_not_read(tmp_path, unavailable):
    (inside,) = write_images(tmp_path / "in", ["a.png"])
    (outside,) = write_images(tmp_path / "out", ["b.png"])
    write_features(tmp_path / "t", [inside, outside, f"{unavailable}/c.png"])
    write_gallery(tmp_path / "t", tmp_path / "g.html", allowed_roots=[str(tmp_path / "in")])
    images = data_of(tmp_path / "g.html")["images"]
    problems = [image.get("problem") for image in images]
    forbidden = IMAGE_ERROR_CODES["forbidden_path"]
    assert sorted(problems, key=bool) == [None, forbidden, forbidden]
    assert Unavailable.requested == []
    with pytest.raises(OptionError, match="use an absolute path"):
        write_gallery(tmp_path / "t", tmp_path / "g.html", allowed_roots=["in"])


def test_a_page_is_as_large_as_its_thumbnails(tmp_path):
    paths = write_images(tmp_path, [f"{number}.png" for number in range(20)], (400, 300))
    write_features(tmp_path / "t", paths)
    write_gallery(tmp_path / "t", tmp_path / "g.html")
    assert (tmp_path / "g.html").stat().st_size < 40_000 + 20 * 12_000


def test_a_hostile_name_stays_text(tmp_path):
    paths = write_images(tmp_path / "photos", [HOSTILE, "b.png"])
    write_features(tmp_path / "t", paths)
    write_gallery(tmp_path / "t", tmp_path / "g.html")
    page = (tmp_path / "g.html").read_text("utf-8")
    assert sorted(image["name"] for image in data_of(tmp_path / "g.html")["images"]) == sorted(
        [HOSTILE, "b.png"]
    )
    assert page.count("</script>") == 2
    assert not any("onerror" in attributes for _, attributes in Elements(page).tags)
    assert "img" not in [tag for tag, _ in Elements(page).tags]


def test_a_page_names_nothing_outside_itself(table, tmp_path):
    write_gallery(table, tmp_path / "g.html")
    page = (tmp_path / "g.html").read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(", page)
    for tag, attributes in Elements(page).tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), tag
    policy = next(a for _, a in Elements(page).tags if a.get("http-equiv"))
    assert "default-src 'none'; img-src data:;" in str(policy["content"])


def test_a_page_is_the_same_each_time(table, tmp_path):
    for name in ("g.html", "h.html"):
        write_gallery(table, tmp_path / name)
    assert (tmp_path / "g.html").read_bytes() == (tmp_path / "h.html").read_bytes()


@pytest.mark.parametrize("option", ["neighbours", "thumbnail_size", "max_images"])
def test_a_number_below_1_is_an_option_error(table, tmp_path, option):
    with pytest.raises(OptionError, match=f"{option}=0 is not valid: use an integer of at least 1"):
        write_gallery(table, tmp_path / "g.html", **{option: 0})  # type: ignore[arg-type]


def test_a_missing_table_is_an_option_error_and_leaves_no_page(tmp_path):
    with pytest.raises(OptionError, match="does not exist"):
        write_gallery(tmp_path / "nowhere", tmp_path / "g.html")
    assert not (tmp_path / "g.html").exists()


def test_importing_it_is_light():
    printed = run_python(
        "import sys, imagevec.search.gallery; print({'torch', 'pyspark'} & sys.modules.keys())"
    )
    assert printed == "set()\n"
