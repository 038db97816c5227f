"""Files of weights: URLs, objects of stores, folders and shards."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import squeezenet1_1

from imagevec import OptionError, WeightsError, cache
from imagevec.models.factory import FactorySource
from imagevec.models.source import REGISTERED
from imagevec.models.weights import local_file, weights_file
from imagevec.plan import make_plan
from imagevec.storage import stores
from tests.helpers.images import encode, photo
from tests.helpers.object_store import TEST_KEYS, s3_server
from tests.helpers.pipeline import run_python, vector_of
from tests.models.forms import bytes_of, shards, small, state

PNG = encode(photo(64, 64))


class Site(http.server.BaseHTTPRequestHandler):
    """Serves ``files``. It may break off each answer, or give no time of modification."""

    files: dict[str, bytes]
    asked: list[tuple[str, str]]
    breaks_after: int | None
    modified: str | None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path))
        body = self.files.get(self.path.partition("?")[0])
        if body is None:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if self.modified:
            self.send_header("Last-Modified", self.modified)
        self.end_headers()
        if self.command == "GET":
            end = len(body) if self.breaks_after is None else start + self.breaks_after
            self.wfile.write(body[start:end])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Any]:
    class OneSite(Site):
        files: dict[str, bytes] = {}
        asked: list[tuple[str, str]] = []
        breaks_after = None
        modified = "Wed, 21 Oct 2015 07:28:00 GMT"
        url = ""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneSite)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    OneSite.url = f"http://127.0.0.1:{server.server_port}"
    yield OneSite
    server.shutdown()
    server.server_close()


@pytest.fixture
def data() -> bytes:
    return bytes_of(state())


def downloads(site: Any) -> int:
    return [command for command, _ in site.asked].count("GET")


def test_url_is_downloaded_once(site: Any, data: bytes) -> None:
    site.files["/model.pth"] = data
    first = weights_file(f"{site.url}/model.pth")
    assert first.read_bytes() == data
    assert first.parent == cache.folder("files")
    assert weights_file(f"{site.url}/model.pth") == first
    assert downloads(site) == 1


def test_remembered_plan_of_a_url_downloads_nothing(site: Any) -> None:
    site.files["/squeezenet.pth"] = bytes_of(squeezenet1_1().state_dict())
    code = f"""
import sys
from imagevec.plan import make_plan
plan = make_plan(model="squeezenet1_1", weights="{site.url}/squeezenet.pth", engine="torch")
print(plan.spec.weights, "torch" in sys.modules)
"""
    first, second = run_python(code).split(), run_python(code).split()
    assert first[0] == second[0]
    assert second[1] == "False"
    assert downloads(site) == 1


def test_changed_file_at_a_url_is_another_plan(site: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(REGISTERED, "small", FactorySource(small, registered_name="small"))
    specs = []
    for seed in (1, 2):
        site.files["/model.pth"] = bytes_of(state(seed=seed))
        site.modified = f"Wed, 21 Oct 2015 07:28:0{seed} GMT"
        plan = make_plan(model="small", weights=f"{site.url}/model.pth", engine="torch")
        specs.append(plan.spec.weights)
    assert specs[0] != specs[1]


def test_url_without_a_time_is_downloaded_each_time(site: Any, data: bytes) -> None:
    site.files["/model.pth"] = data
    site.modified = None
    assert weights_file(f"{site.url}/model.pth") == weights_file(f"{site.url}/model.pth")
    assert downloads(site) == 2


def test_broken_download_is_continued(site: Any) -> None:
    data = bytes_of({"weight": torch.rand(1_500_000, generator=torch.manual_seed(0))})
    site.files["/model.pth"] = data
    site.breaks_after = 2_500_000
    assert weights_file(f"{site.url}/model.pth").read_bytes() == data
    assert downloads(site) >= 3


def test_url_with_a_query_or_without_a_suffix(site: Any, data: bytes) -> None:
    site.files["/download"] = data
    found = weights_file(f"{site.url}/download?id=7&token=a.b")
    assert found.read_bytes() == data
    vector = vector_of(PNG, model=small, weights=f"{site.url}/download?id=7")
    assert vector == vector_of(PNG, model=small, weights=str(found))


def test_missing_url_is_named(site: Any) -> None:
    with pytest.raises(WeightsError, match=rf"weights='{site.url}/none.pth': no such file"):
        weights_file(f"{site.url}/none.pth")


def test_web_page_is_named_by_its_url_and_not_kept(site: Any) -> None:
    site.files["/model.pth"] = b"<!doctype html>"
    before = set(cache.folder("files").iterdir())
    with pytest.raises(WeightsError, match=f"{site.url}/model.pth is not a .* web page"):
        weights_file(f"{site.url}/model.pth")
    assert set(cache.folder("files").iterdir()) == before


def test_unknown_scheme_is_an_error() -> None:
    with pytest.raises(WeightsError, match="weights='gopher://host/a.pth': the scheme"):
        weights_file("gopher://host/a.pth")


def test_denied_url_is_an_error_at_once(site: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(site, "do_GET", lambda self: self.send_error(403))
    with pytest.raises(WeightsError, match=r"HTTP status 403"):
        weights_file(f"{site.url}/model.pth")


def test_object_of_a_store(data: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(stores, "_stores", type(stores._stores)())
    for name, value in TEST_KEYS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as (endpoint, client):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        client.create_bucket(Bucket="weights")
        client.put_object(Bucket="weights", Key="run 1/last.ckpt", Body=data)
        path = weights_file("s3a://weights/run 1/last.ckpt")
        assert path.read_bytes() == data
        with pytest.raises(WeightsError, match=r"weights='s3://weights/none.pth': no such file"):
            weights_file("s3://weights/none.pth")


def test_shards_at_a_url(site: Any, tmp_path: Path) -> None:
    index = shards(tmp_path)
    site.files |= {f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    joined = weights_file(f"{site.url}/{index.name}")
    assert joined.read_bytes() == weights_file(str(index)).read_bytes()
    asked = downloads(site)
    assert weights_file(f"{site.url}/{index.name}") == joined
    assert downloads(site) == asked == 3


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_joined_shards_have_all_tensors(suffix: str, tmp_path: Path) -> None:
    joined = load_file(weights_file(str(shards(tmp_path, suffix))))
    assert joined.keys() == state().keys()
    for key, tensor in state().items():
        assert torch.equal(joined[key], tensor), key


def test_changed_shard_is_another_file(tmp_path: Path) -> None:
    index = shards(tmp_path)
    before = weights_file(str(index))
    assert weights_file(str(index)) == before
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(shard).items()}, shard)
    assert weights_file(str(index)) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "it has no weight_map"),
        ("[1]", "it has no weight_map"),
        ("{", "it has no weight_map"),
        ('{"weight_map": {}}', "its weight_map is empty"),
        ('{"weight_map": {"a": "../a.bin"}}', "names the shard '../a.bin', not a file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a file beside it"),
        ('{"weight_map": {"a": "s3://bucket/a"}}', "not a file beside it"),
        ('{"weight_map": {"a": ".."}}', "not a file beside it"),
        ('{"weight_map": {"a": 3}}', "not a file beside it"),
    ],
)
def test_malformed_index_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=message):
        weights_file(str(tmp_path / "model.safetensors.index.json"))


def test_local_path_may_be_a_uri_or_relative(tmp_path: Path, monkeypatch: Any) -> None:
    torch.save(state(), tmp_path / "a b.weights")
    monkeypatch.chdir(tmp_path)
    absolute = (f"file:{tmp_path}/a%20b.weights", f"file://{tmp_path}/a b.weights")
    for option in (*absolute, "./a b.weights"):
        assert weights_file(option) == tmp_path / "a b.weights"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_file("~/a b.weights") == tmp_path / "a b.weights"


def test_name_is_not_a_path() -> None:
    with pytest.raises(OptionError, match=r"weights='IMAGENET' is not known for 'm': .*\.ckpt"):
        local_file("m", "IMAGENET")
    assert local_file("m", "random") is None
