from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark import SparkContext
from pyspark.sql import SparkSession
from torch import nn

from imagevec import ImageVectorizer, SerializationError, features_udf, make_features_udf
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved
from tests.helpers.spark import Frame

IMAGES = [encode(photo(seed=seed)) for seed in range(3)]


def features(frame, **options) -> np.ndarray:
    df = frame(IMAGES).select(features_udf("content", **{"engine": "torch", **options}))
    return np.array([row[0] for row in df.collect()])


def without_spark(**options) -> np.ndarray:
    vectorizer = ImageVectorizer(**{"engine": "torch", **options})
    return np.array([vectorizer.extract_features(image) for image in IMAGES])


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_weights_reach_the_workers(frame, tmp_path, engine):
    saved(tiny, tmp_path / "weights.pth")
    options = {"model": tiny, "weights": str(tmp_path / "weights.pth"), "engine": engine}
    np.testing.assert_allclose(features(frame, **options), without_spark(**options), rtol=1e-4)


def test_workers_get_the_weights_that_a_factory_drew_on_the_driver(frame):
    def unseeded() -> nn.Module:
        return Tiny()

    vectorizer: Any = ImageVectorizer(model=unseeded, engine="torch")
    df = vectorizer.process_images(frame(IMAGES, partitions=3))
    ours = np.array([row.features for row in df.collect()])
    theirs = [vectorizer.extract_features(image) for image in IMAGES]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_original_file_may_go_after_the_udf_is_made(frame, tmp_path):
    path = tmp_path / "weights.pth"
    saved(tiny, path, seed=2)
    expected = without_spark(model=tiny, weights=str(path))
    udf = make_features_udf(model=tiny, weights=str(path), engine="torch")
    path.unlink()
    rows = frame(IMAGES).select(udf("content")).collect()
    np.testing.assert_allclose([row[0] for row in rows], expected, rtol=1e-4)


def test_two_files_of_the_same_name_do_not_meet(frame, tmp_path):
    path = tmp_path / "weights.pth"
    columns: list[Any] = []
    expected: list[Any] = []
    for seed in (3, 4):
        saved(tiny, path, seed)
        expected.append(without_spark(model=tiny, weights=str(path)))
        udf = make_features_udf(model=tiny, weights=str(path), engine="torch")
        columns.append(udf("content"))
        path.unlink()
    rows = frame(IMAGES).select(*columns).collect()
    for column in range(2):
        np.testing.assert_allclose([row[column] for row in rows], expected[column], rtol=1e-4)
    assert not np.allclose(*expected)


def test_a_file_is_shipped_once(spark, tmp_path):
    saved(tiny, tmp_path / "weights.pth", seed=7)
    before = len(spark.sparkContext.listFiles)
    for _ in range(3):
        make_features_udf(model=tiny, weights=str(tmp_path / "weights.pth"), engine="torch")
    assert len(spark.sparkContext.listFiles) == before + 1


def test_a_file_is_added_once(spark, tmp_path, monkeypatch):
    """Spark warns about each file that is added again."""
    added = []
    add_file = SparkContext.addFile

    def counted(context, path):
        added.append(path)
        add_file(context, path)

    monkeypatch.setattr(SparkContext, "addFile", counted)
    saved(tiny, tmp_path / "weights.pth", seed=8)
    options: Any = {"model": tiny, "weights": str(tmp_path / "weights.pth"), "engine": "torch"}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_features_udf(**options), range(8)))
    assert len(added) == 1


def test_random_weights_need_no_file(spark):
    before = len(spark.sparkContext.listFiles)
    make_features_udf(model=tiny, weights="random", engine="torch")
    assert len(spark.sparkContext.listFiles) == before


MODULE = """\
import threading

from torch import nn

import beside_layers

lock = threading.Lock()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 8)

    def forward(self, images):
        import beside_lazy

        return beside_lazy.scaled(beside_layers.pooled(self.fc, images))


def factory():
    return Net()


def with_lock():
    with lock:
        return Net()
"""
MODULES = {
    "beside_script": MODULE,
    "beside_layers": "def pooled(fc, images):\n    return fc(images.mean((2, 3)))\n",
    "beside_lazy": "SCALE = 2\n\n\ndef scaled(x):\n    return x * SCALE\n",
}


@pytest.fixture
def beside_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module in a folder that only the driver has in its path."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("beside_script")
    for name in MODULES:
        sys.modules.pop(name, None)


def test_workers_do_not_import_the_module_of_a_factory(
    frame: Frame, beside_script: Any, tmp_path: Path
) -> None:
    """They run the code of the driver, edited or not."""
    options: dict[str, Any] = {"model": beside_script.factory, "layer": "logits"}
    saved(beside_script.factory, tmp_path / "weights.pth")
    options["weights"] = str(tmp_path / "weights.pth")
    before = features(frame, **options)
    np.testing.assert_allclose(before, without_spark(**options), rtol=1e-4)
    beside_script.beside_layers.pooled = lambda fc, images: -fc(images.mean((2, 3)))
    after = features(frame, **options)
    np.testing.assert_allclose(after, without_spark(**options), rtol=1e-4)
    np.testing.assert_allclose(after, -before, rtol=1e-4)


def test_module_that_cannot_be_pickled_is_sent_with_add_py_file(
    frame: Frame, spark: SparkSession, beside_script: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": beside_script.with_lock, "layer": "logits"}
    with pytest.raises(SerializationError, match=r"is a lock.*addPyFile\('.*beside_script.py'\)"):
        features(frame, **options, weights="random")
    for name in MODULES:
        spark.sparkContext.addPyFile(str(tmp_path / f"{name}.py"))
    options["weights"] = "random"
    np.testing.assert_allclose(features(frame, **options), without_spark(**options), rtol=1e-4)


def test_openvino_workers_need_no_factory(beside_script: Any) -> None:
    assert (
        make_plan(model=beside_script.factory, weights="random", engine="openvino").source is None
    )
