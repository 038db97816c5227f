from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from examples.photos import write_photos
from imagevec import FeatureSpec, ImageVectorizer, Preprocessing, extract, plan, text_features
from imagevec.cli import main
from imagevec.models import open_clip
from tests.helpers.images import encode, photo
from tests.helpers.tables import write_made_of, write_table


@pytest.fixture
def table(tmp_path) -> str:
    rows = {"file:/p/a.jpg": [1.0, 0.0], "file:/p/b.jpg": [-3.0, -4.0], "file:/p/c.jpg": [4.0, 3.0]}
    return str(write_table(tmp_path, rows))


def test_a_table_for_each_query(table, capsys):
    assert main(["similar", table, "--query", "/p/a.jpg", "--query", "/p/c.jpg", "-k", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "/p/a.jpg",
        "rank   cosine  path",
        "   1   0.8000  file:/p/c.jpg",
        "   2  -0.6000  file:/p/b.jpg",
        "",
        "/p/c.jpg",
        "rank   cosine  path",
        "   1   0.8000  file:/p/a.jpg",
        "   2  -0.9600  file:/p/b.jpg",
    ]


def test_json(table, capsys):
    assert main(["similar", table, "--query", "/p/a.jpg", "-k", "1", "--json"]) == 0
    neighbours = [{"path": "file:/p/c.jpg", "cosine": 0.8}]
    assert json.loads(capsys.readouterr().out) == {
        "queries": [{"query": "/p/a.jpg", "neighbours": neighbours}]
    }


def test_a_query_is_required(table, capsys):
    assert main(["similar", table]) == 1
    assert "give --query IMAGE or --text TEXT" in capsys.readouterr().err


def test_a_table_of_a_model_without_texts(tmp_path, capsys):
    spec = FeatureSpec("resnet18", "random", "pooled", 2, Preprocessing(), "float32", False)
    table = write_made_of(tmp_path, {"/p/a.jpg": [1.0, 0.0]}, spec.metadata)
    assert main(["similar", table, "--text", "a red shoe"]) == 1
    assert "model='resnet18' cannot encode text: use an open_clip" in capsys.readouterr().err


def test_texts_find_the_photos_of_the_demo(clip, spark, tmp_path, capsys):
    """With seeded weights, so what is found makes no sense, but is what the vectors say."""
    write_photos(tmp_path / "photos")
    options: dict[str, Any] = {"model": "open_clip/tiny-vit", "weights": "random"}
    photos, features = str(tmp_path / "photos"), str(tmp_path / "features")
    assert extract(photos, features, spark=spark, **options).features == 80
    texts = ["a cup of coffee", "a rocket"]
    command = ["similar", features, "-k", "3", "--json"]
    for text in texts:
        command += ["--text", text]
    assert main([*command, "--query", f"{photos}/coffee.png"]) == 0
    of_photo, *found = json.loads(capsys.readouterr().out)["queries"]
    assert of_photo["query"] == f"{photos}/coffee.png"
    assert [query["query"] for query in found] == texts

    vectorizer = ImageVectorizer(**options)
    files = [f for f in (tmp_path / "photos").iterdir() if f.name != "broken.jpg"]
    vectors = np.array([vectorizer.extract_features(str(file)) for file in files])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, vector in zip(found, text_features(texts, **options), strict=True):
        cosines = units @ vector / np.linalg.norm(vector)
        nearest = np.sort(cosines)[::-1][:3]
        told = [neighbour["cosine"] for neighbour in query["neighbours"]]
        np.testing.assert_allclose(told, nearest, atol=1e-5)
        by_name = dict(zip((file.name for file in files), cosines, strict=True))
        names = [neighbour["path"].rpartition("/")[2] for neighbour in query["neighbours"]]
        np.testing.assert_allclose([by_name[name] for name in names], nearest, atol=1e-5)


def test_a_tag_is_remembered(clip, spark, tmp_path, monkeypatch, capsys):
    """The model has two tags with weights of their own, and none is the default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed, tag in enumerate(("first", "second"), 1):
        torch.manual_seed(seed)
        torch.save(clip.create_model("tiny-vit").state_dict(), tmp_path / f"{tag}.pt")
    tags = {
        tag: {"tag": tag, "mean": [mean] * 3} for tag, mean in (("first", 0.9), ("second", 0.1))
    }
    monkeypatch.setitem(clip.pretrained._PRETRAINED, "tiny-vit", tags)
    monkeypatch.setattr(open_clip, "_downloaded", lambda name, cfg: tmp_path / f"{cfg['tag']}.pt")
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        (tmp_path / "photos" / f"{seed}.png").write_bytes(encode(photo(seed=seed)))
    (tmp_path / "query.png").write_bytes(encode(photo(seed=1)))
    options: Any = {"model": "open_clip/tiny-vit", "weights": "second"}
    features = str(tmp_path / "features")
    extract(tmp_path / "photos", features, spark=spark, **options)
    monkeypatch.setattr(plan, "_plans", {})  # as in a new process
    query = ["--text", "a rocket", "--query", str(tmp_path / "query.png")]
    assert main(["similar", features, *query, "-k", "1", "--json"]) == 0
    of_photo, of_text = json.loads(capsys.readouterr().out)["queries"]
    assert of_photo["neighbours"][0]["path"].endswith("1.png")
    assert of_photo["neighbours"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert len(of_text["neighbours"]) == 1


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "does not exist: give the folder"), ("photos", "has no Parquet files")],
)
def test_texts_need_a_table(tmp_path, capsys, folder, message):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no table")
    assert main(["similar", str(tmp_path / folder), "--text", "a rocket"]) == 1
    assert message in capsys.readouterr().err


def test_k_below_1(table, capsys):
    assert main(["similar", table, "--query", "/p/a.jpg", "-k", "0"]) == 1
    assert "imagevec: k=0 is not valid" in capsys.readouterr().err
