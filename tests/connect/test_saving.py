"""Featurizers that are saved and loaded on Spark Connect, with their files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.sql import DataFrame, SparkSession

from imagevec import (
    ImageFeaturizer,
    OptionError,
    Preprocessing,
    WeightsError,
    register_model,
)
from imagevec.engines import openvino
from imagevec.files import digest_of
from imagevec.models import saved as saved_model
from imagevec.models.features import FeatureModel
from imagevec.models.registry import find_source
from imagevec.spark import featurizer as module
from imagevec.storage.folder import Folder
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved

NAME = "tiny for saving"
IMAGES: list[Any] = [*(encode(photo(seed=seed)) for seed in range(4)), None]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_model(NAME, tiny, preprocessing=Preprocessing(resize_size=32, crop_size=32))


@pytest.fixture(scope="module")
def frame(spark: SparkSession) -> DataFrame:
    rows = [(i, image, float(i % 2)) for i, image in enumerate(IMAGES)]
    return spark.createDataFrame(rows, "id int, content binary, label double")


@pytest.fixture
def with_weights(tmp_path: Path) -> Callable[[int], ImageFeaturizer]:
    """Returns a function that makes a featurizer whose weights depend on a seed."""

    def make(seed: int = 0) -> ImageFeaturizer:
        path = tmp_path / "original" / f"{seed}.pth"
        path.parent.mkdir(exist_ok=True)
        saved(tiny, path, seed=seed)
        return ImageFeaturizer(model=NAME, weights=str(path), engine="torch", outputType="vector")

    return make


@pytest.fixture
def with_model(tmp_path: Path) -> ImageFeaturizer:
    """A featurizer of a saved model."""
    pytest.importorskip("openvino")
    model = FeatureModel(find_source(NAME), weights="random", layer="logits", normalize=False)
    folder = tmp_path / "original"
    folder.mkdir()
    files = openvino.save(openvino.convert(model), folder)
    saved_model.write(folder, model.spec, "openvino", files)
    return ImageFeaturizer(model=str(folder))


def vectors(featurizer: Any, frame: DataFrame) -> list[Any]:
    rows = featurizer.transform(frame).orderBy("id").select("features").collect()
    return [None if row.features is None else list(row.features) for row in rows]


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "files").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["saved", "a b", "c%20d", "é", "x[1]{a}*", "a+b#c?d"])
def test_weights_are_saved(with_weights: Any, frame: DataFrame, tmp_path: Path, name: str) -> None:
    featurizer = with_weights()
    expected = vectors(featurizer, frame)
    assert len(expected[0]) == 8 and expected[-1] is None
    (original,) = (tmp_path / "original").iterdir()
    featurizer.save(str(tmp_path / name))
    assert [path.name for path in files_in(tmp_path / name)] == [
        f"imagevec-{digest_of(original)}.pth"
    ]
    shutil.rmtree(tmp_path / "original")
    loaded = ImageFeaturizer.load(str(tmp_path / name))
    shutil.rmtree(tmp_path / name)
    assert vectors(loaded, frame) == expected


def test_a_saved_model_is_saved(
    with_model: ImageFeaturizer, frame: DataFrame, tmp_path: Path
) -> None:
    expected = vectors(with_model, frame)
    assert len(expected[0]) == 5
    with_model.save(str(tmp_path / "saved"))
    names = {path.name for path in files_in(tmp_path / "saved")}
    assert names == {"spec.json", "model.xml", "model.bin"}
    shutil.rmtree(tmp_path / "original")
    assert vectors(ImageFeaturizer.load(str(tmp_path / "saved")), frame) == expected


def test_a_path_means_what_it_means_to_spark(
    with_weights: Any, frame: DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server keeps its working directory when that of the client changes."""
    place = os.path.relpath(tmp_path / "saved")
    featurizer = with_weights()
    expected = vectors(featurizer, frame)
    monkeypatch.chdir(tmp_path / "original")
    featurizer.save(place)
    assert len(files_in(tmp_path / "saved")) == 1
    assert vectors(ImageFeaturizer.load(place), frame) == expected


def test_a_pipeline_is_saved(with_weights: Any, frame: DataFrame, tmp_path: Path) -> None:
    labelled = frame.where("content is not null")
    pipeline = Pipeline(stages=[with_weights(), LogisticRegression(maxIter=5)])
    fitted = pipeline.fit(labelled)
    expected = predictions(fitted, labelled)
    pipeline.save(str(tmp_path / "a pipeline"))
    fitted.save(str(tmp_path / "fitted"))
    fitted.write().overwrite().save(str(tmp_path / "fitted"))
    shutil.rmtree(tmp_path / "original")
    loaded = Pipeline.load(str(tmp_path / "a pipeline"))
    assert predictions(loaded.fit(labelled), labelled) == expected
    assert predictions(PipelineModel.load(str(tmp_path / "fitted")), labelled) == expected


def predictions(model: Any, frame: DataFrame) -> list[Any]:
    rows = model.transform(frame).orderBy("id").select("features", "probability").collect()
    return [(list(row.features), list(row.probability)) for row in rows]


def test_only_overwrite_replaces(with_weights: Any, frame: DataFrame, tmp_path: Path) -> None:
    place = tmp_path / "saved"
    first, second = with_weights(0), with_weights(1)
    (place / "files").mkdir(parents=True)
    (place / "files" / "a file").touch()
    first.save(str(place))
    before = files_in(place)
    assert len(before) == 2
    with pytest.raises(Exception, match="PATH_ALREADY_EXISTS|already exists"):
        second.save(str(place))
    assert files_in(place) == before
    assert vectors(ImageFeaturizer.load(str(place)), frame) == vectors(first, frame)
    second.write().overwrite().save(str(place))
    assert len(files_in(place)) == 1 and files_in(place) != before
    assert vectors(ImageFeaturizer.load(str(place)), frame) == vectors(second, frame)


def test_a_loaded_one_replaces_its_origin(
    with_weights: Any, frame: DataFrame, tmp_path: Path
) -> None:
    place = str(tmp_path / "saved")
    featurizer = with_weights()
    featurizer.save(place)
    ImageFeaturizer.load(place).write().overwrite().save(place)
    assert vectors(ImageFeaturizer.load(place), frame) == vectors(featurizer, frame)


def test_a_missing_file_is_refused(with_weights: Any, tmp_path: Path) -> None:
    with_weights().save(str(tmp_path / "saved"))
    (file,) = files_in(tmp_path / "saved")
    file.unlink()
    with pytest.raises(WeightsError, match=f"{file.name} does not exist"):
        ImageFeaturizer.load(str(tmp_path / "saved"))


def test_a_missing_file_of_a_model_is_refused(with_model: ImageFeaturizer, tmp_path: Path) -> None:
    with_model.save(str(tmp_path / "saved"))
    (file,) = (path for path in files_in(tmp_path / "saved") if path.name == "model.bin")
    file.unlink()
    with pytest.raises(WeightsError, match="model.bin does not exist"):
        ImageFeaturizer.load(str(tmp_path / "saved"))


def test_an_altered_file_is_refused(with_weights: Any, tmp_path: Path) -> None:
    with_weights().save(str(tmp_path / "saved"))
    (file,) = files_in(tmp_path / "saved")
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(WeightsError, match="was altered"):
        ImageFeaturizer.load(str(tmp_path / "saved"))


def test_a_disk_of_the_server_is_refused(
    with_weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has no such folder."""

    class Missing(Folder):
        def names(self, folder: str = "", only_files: bool = False) -> list[str]:
            return []

    featurizer, place = with_weights(), tmp_path / "saved"
    featurizer.save(str(place))
    monkeypatch.setattr(module, "Folder", Missing)
    with pytest.raises(OptionError, match="Spark and this process do not share .*/saved"):
        featurizer.save(str(tmp_path / "other" / "saved"))
    assert files_in(tmp_path / "other" / "saved") == []
    with pytest.raises(OptionError, match="Spark and this process do not share .*/saved"):
        ImageFeaturizer.load(str(place))
