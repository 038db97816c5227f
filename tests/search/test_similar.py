from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from imagevec import FingerprintError, ImageVectorizer, OptionError, Preprocessing
from imagevec.search import similar as module
from imagevec.search.neighbours import nearest
from imagevec.search.similar import similar
from imagevec.spec import FeatureSpec
from imagevec.table import read
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import run_python, write_code
from tests.helpers.tables import FLOATS, write_made_of, write_table

ROWS = {
    "file:/p/a.jpg": [1.0, 0.0],
    "file:/p/b.jpg": [1.0, 0.1],
    "file:/p/c.jpg": [0.0, 1.0],
    "file:/p/d.jpg": None,
    "file:/p/e.jpg": [2.0, 0.2],
}
SPEC = FeatureSpec(
    model="some",
    weights="random",
    layer="pooled",
    num_features=2,
    preprocessing=Preprocessing(),
    precision="float32",
    normalize=False,
)


def paths_of(found: dict[str, Any]) -> list[str]:
    return [neighbour["path"] for neighbour in found["neighbours"]]


def write_split(
    folder: Path, rows: list[tuple[str, Any]], files: list[int], row_group_size: int
) -> None:
    """A table whose row ``n`` is in file ``files[n]``."""
    for file in set(files):
        part = [row for row, place in zip(rows, files, strict=True) if place == file]
        columns = {
            "path": pa.array([path for path, _ in part], pa.string()),
            "features": pa.array([vector for _, vector in part], FLOATS),
        }
        path = folder / f"part-{file}.parquet"
        parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


@given(data=st.data())
def test_the_result_does_not_depend_on_how_the_table_is_split(data):
    """Many vectors are copies, some at another length; ties go to the smaller path."""
    draw = data.draw
    chance = np.random.default_rng(draw(st.integers(0, 999)))
    kinds = chance.normal(size=(6, 3)).astype(np.float32)
    kinds[3], kinds[4] = kinds[0] * 3, 0
    choices = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, None]), min_size=1, max_size=25))
    rows = [
        (f"file:/p/{number:02}.jpg", None if kind is None else kinds[kind].tolist())
        for number, kind in enumerate(choices)
    ]
    there = [(path, vector) for path, vector in rows if vector is not None]
    if not there:
        return
    queries = draw(st.lists(st.sampled_from([path for path, _ in there]), max_size=3))
    queries.append("/elsewhere/00.jpg")
    k = draw(st.integers(1, 4) | st.integers(1, 30))
    order = chance.permutation(len(rows))
    files = chance.integers(0, draw(st.integers(1, 4)), len(rows)).tolist()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(read, "_ROWS", draw(st.integers(1, 25))),
        mock.patch.object(
            module, "_vectors_computed", lambda _, missing, *__: dict.fromkeys(missing, kinds[0])
        ),
    ):
        write_split(Path(folder), [rows[i] for i in order], files, draw(st.integers(1, 25)))
        found = similar(folder, queries, k)

    paths, vectors = [path for path, _ in there], np.array([v for _, v in there], np.float32)
    assert [result["query"] for result in found] == queries
    for query, result in zip(queries, found, strict=True):
        vector = vectors[paths.index(query)] if query in paths else kinds[0]
        indices, cosines = nearest(vector[None], vectors, len(paths))
        expected = [
            {"path": paths[index], "cosine": round(float(cosine), 6)}
            for index, cosine in zip(indices[0], cosines[0], strict=True)
            if paths[index] != query
        ]
        assert result["neighbours"] == expected[:k]


def test_neighbours_and_cosines(tmp_path):
    (found,) = similar(str(write_table(tmp_path, ROWS)), ["file:/p/a.jpg"], 10)
    assert found == {
        "query": "file:/p/a.jpg",
        "neighbours": [
            {"path": "file:/p/b.jpg", "cosine": pytest.approx(1 / 1.01**0.5, abs=1e-6)},
            {"path": "file:/p/e.jpg", "cosine": pytest.approx(1 / 1.01**0.5, abs=1e-6)},
            {"path": "file:/p/c.jpg", "cosine": 0},
        ],
    }


@pytest.mark.parametrize("query", ["/p/a.jpg", "file:///p/a.jpg", "file:/p/a.jpg"])
def test_a_query_is_found_however_its_path_is_written(tmp_path, query):
    (found,) = similar(str(write_table(tmp_path, ROWS)), [query], 1)
    assert (found["query"], paths_of(found)) == (query, ["file:/p/b.jpg"])


def test_a_query_may_be_relative(tmp_path, monkeypatch):
    rows = {f"file:{tmp_path}/a.jpg": [1.0, 0.0], f"file:{tmp_path}/sub/a.jpg": [0.0, 1.0]}
    write_table(tmp_path / "t", rows)
    monkeypatch.chdir(tmp_path)
    assert paths_of(similar("t", ["a.jpg"], 5)[0]) == [f"file:{tmp_path}/sub/a.jpg"]
    assert paths_of(similar("t", ["sub/a.jpg"], 5)[0]) == [f"file:{tmp_path}/a.jpg"]
    assert paths_of(similar("t", ["sub/../a.jpg"], 5)[0]) == [f"file:{tmp_path}/sub/a.jpg"]


def test_uris_of_a_store(tmp_path):
    rows = {"s3://x/a b%20.jpg": [1.0, 0.0], "s3://y/a b%20.jpg": [0.0, 1.0]}
    (found,) = similar(str(write_table(tmp_path, rows)), ["s3://x/a b%20.jpg"], 5)
    assert paths_of(found) == ["s3://y/a b%20.jpg"]


def test_several_queries_one_of_them_twice(tmp_path):
    queries = ["/p/c.jpg", "/p/a.jpg", "/p/c.jpg"]
    found = similar(str(write_table(tmp_path, ROWS)), queries, 1)
    assert [result["query"] for result in found] == queries
    assert [paths_of(r) for r in found] == [["file:/p/b.jpg"], ["file:/p/b.jpg"], ["file:/p/b.jpg"]]


def test_a_query_that_is_there_twice_is_no_neighbour(tmp_path):
    write_table(tmp_path, {"file:/p/a.jpg": [1.0, 0.0], "file:/p/b.jpg": [1.0, 1.0]}, part=0)
    write_table(tmp_path, {"/p/a.jpg": [1.0, 0.0], "file:/p/c.jpg": [0.0, 1.0]}, part=1)
    (found,) = similar(str(tmp_path), ["/p/a.jpg"], 2)
    assert paths_of(found) == ["file:/p/b.jpg", "file:/p/c.jpg"]


def test_an_image_that_has_no_other(tmp_path):
    (found,) = similar(str(write_table(tmp_path, {"/p/a.jpg": [1.0]})), ["/p/a.jpg"], 3)
    assert found["neighbours"] == []


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_1(tmp_path, k):
    with pytest.raises(OptionError, match=f"k={k} is not valid: use an integer of at least 1"):
        similar(str(write_table(tmp_path, ROWS)), ["/p/a.jpg"], k)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match="nowhere does not exist: give the folder"):
        similar(str(tmp_path / "nowhere"), ["/p/a.jpg"], 1)


@pytest.mark.parametrize("query", ["/p/a.jpg", "/elsewhere/a.jpg"])
def test_a_table_without_features(tmp_path, query):
    parquet.write_table(pa.table({"path": ["/p/a.jpg"]}), tmp_path / "x.parquet")
    with pytest.raises(OptionError, match="no column 'features'"):
        similar(str(tmp_path), [query], 1)


def test_vectors_of_two_lengths(tmp_path):
    write_table(tmp_path, {"/p/a.jpg": [1.0], "/p/b.jpg": [1.0, 2.0]})
    with pytest.raises(OptionError, match=r"vectors of \[1, 2\] features: use one model"):
        similar(str(tmp_path), ["/p/a.jpg"], 1)


@pytest.mark.parametrize("query", ["/p/d.jpg", "/elsewhere/a.jpg"])
def test_a_query_without_a_vector_needs_the_model(tmp_path, query):
    with pytest.raises(FingerprintError, match="has no provenance"):
        similar(str(write_table(tmp_path, ROWS)), [query], 1)
    spec = dataclasses.replace(SPEC, precision="int8")
    folder = write_made_of(tmp_path, ROWS, spec.metadata)
    with pytest.raises(OptionError, match="made with 'some', a file or folder: give it as --model"):
        similar(folder, [query], 1)
    function = dataclasses.replace(spec, model="factory:some", precision="float32")
    with pytest.raises(OptionError, match="only its own images can be queries"):
        similar(write_made_of(tmp_path, ROWS, function.metadata), [query], 1)
    exported = dataclasses.replace(spec, model="pt2:some", precision="float32")
    with pytest.raises(
        OptionError, match="made with 'pt2:some', a file or folder: give it as --model"
    ):
        similar(write_made_of(tmp_path, ROWS, exported.metadata), [query], 1)


def test_a_query_is_computed_at_the_input_size_of_the_table(tmp_path):
    options: Any = {"model": "squeezenet1_1", "weights": "random", "input_size": (64, 96)}
    vectorizer: Any = ImageVectorizer(**options)
    files = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, file in enumerate(files):
        file.write_bytes(encode(photo(seed=seed)))
    rows = {f"file:/p/{file.name}": vectorizer.extract_features(str(file)) for file in files}
    folder = write_made_of(tmp_path / "t", rows, vectorizer.spec.metadata)
    (found,) = similar(folder, [str(files[1])], 1)
    assert found["neighbours"] == [{"path": "file:/p/1.png", "cosine": pytest.approx(1, abs=1e-6)}]


def test_a_query_is_decoded_as_the_images_of_the_table(tmp_path):
    options: Any = {"model": "squeezenet1_1", "weights": "random", "background": "white"}
    vectorizer: Any = ImageVectorizer(**options)
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    file = tmp_path / "clear.png"
    image.save(file)
    assert vectorizer.extract_features(str(file)) != ImageVectorizer(
        model="squeezenet1_1", weights="random"
    ).extract_features(str(file))
    rows = {"file:/p/clear.png": vectorizer.extract_features(str(file))}
    folder = write_made_of(tmp_path / "t", rows, vectorizer.spec.metadata)
    (found,) = similar(folder, [str(file)], 1)
    (neighbour,) = found["neighbours"]
    assert neighbour["cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("model", ["{}/_m.pt2", "_m.pt2", "{}", "saved", "open_clip/local-dir:{}"])
@pytest.mark.parametrize("texts", [(), ("a text",)])
def test_model_of_table_that_is_not_a_name_is_not_loaded(tmp_path, monkeypatch, model, texts):
    monkeypatch.chdir(tmp_path)
    write_code(tmp_path / "_m.pt2", marker := tmp_path / "marker")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "spec.json").write_text("{}")
    spec = dataclasses.replace(SPEC, model=model.format(tmp_path), weights=f"sha256:{'0' * 64}")
    folder = write_made_of(tmp_path / "t", ROWS, spec.metadata)
    with pytest.raises(OptionError, match="is not a name: models are only loaded from paths"):
        similar(folder, [] if texts else ["/elsewhere/a.jpg"], 1, texts=texts)
    assert not marker.exists()


@pytest.mark.parametrize("weights", ["sha256:*", "sha256:", "sha256:../x", "/tmp/x.pth"])
def test_weights_of_table_that_are_no_digest_are_not_looked_up(tmp_path, weights):
    spec = dataclasses.replace(SPEC, model="resnet18", weights=weights)
    folder = write_made_of(tmp_path, ROWS, spec.metadata)
    with pytest.raises(FingerprintError, match="the weights .* of the table are not valid"):
        similar(folder, ["/elsewhere/a.jpg"], 1)


def test_it_is_light_if_the_query_is_in_the_table(tmp_path):
    write_table(tmp_path, ROWS)
    printed = run_python(
        "import sys; from imagevec.cli import main; "
        f"main(['similar', {str(tmp_path)!r}, '--query', '/p/a.jpg', '--quiet']); "
        "print({'pandas', 'pyspark', 'torch'} & sys.modules.keys())"
    )
    assert printed.splitlines()[-1] == "set()"


def test_memory_does_not_grow_with_the_table(tmp_path):
    """64 MB of vectors in a row group."""
    vectors = np.random.default_rng(0).random(16_000_000, np.float32)
    features = pa.FixedSizeListArray.from_arrays(vectors, 1000).cast(pa.list_(pa.float32()))
    table = pa.table({"path": [f"/p/{row:05}.jpg" for row in range(16_000)], "features": features})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=16_000)
    printed = run_python(
        "import resource; from imagevec.search import similar; "
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = rss(); "
        f"print(len(similar.similar({str(tmp_path)!r}, ['/p/00007.jpg'], 5)[0]['neighbours']), "
        "rss() - before)"
    )
    rows, grown_kilobytes = map(int, printed.split())
    assert rows == 5
    assert grown_kilobytes < 150_000
