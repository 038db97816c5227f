"""Models of ``torch.export.save``."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
    WeightsError,
    cache,
    register_model,
)
from imagevec.plan import make_plan
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import pixels_of, plan_and_engine, preprocess, vector_of

IMAGE = photo(120, 90)
PNG = encode(IMAGE)
BATCH = {0: torch.export.Dim("batch")}
INPUT_OF_32 = Preprocessing(resize_size=36, crop_size=32)


class Backbone(nn.Module):
    """``(N, 3, 32, 32)`` to 6 features; a view in it refuses images in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel_size=5, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 7 * 7, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.conv(images)).relu()  # (N, 8, 7, 7)
        features: torch.Tensor = self.fc(maps.view(maps.shape[0], -1))
        return features


class Mean(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def export(model: nn.Module, path: Path, image: torch.Tensor | None = None, batch=BATCH) -> None:
    images = torch.zeros(2, 3, 32, 32) if image is None else image
    program = torch.export.export(model.eval(), (images,), dynamic_shapes=(batch,))
    torch.export.save(program, path)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Backbone().eval()


@pytest.fixture(scope="module")
def path(backbone, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "backbone.pt2"
    export(backbone, path)
    return path


@pytest.mark.parametrize(
    ("precision", "lowest"), [("float32", 0.99999), ("bfloat16", 0.99)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_it_is_the_program_itself(backbone, path, engine, precision, lowest):
    with torch.inference_mode():
        expected = backbone(preprocess(pixels_of(IMAGE), INPUT_OF_32)[None])[0]
    options = {"model": str(path), "engine": engine, "precision": precision}
    vector = vector_of(PNG, **options)
    assert cosine(vector, expected) >= lowest
    assert np.linalg.norm(vector_of(PNG, **options, normalize=True)) == pytest.approx(1, abs=1e-2)


def test_any_batch_will_do(path):
    _, engine = plan_and_engine(model=str(path))
    images = np.stack([pixels_of(photo(32, 32, seed)) for seed in range(5)])
    vectors = engine(images)
    assert vectors.shape == (5, 6)
    for count in (1, 2, 3):
        np.testing.assert_allclose(engine(images[:count]), vectors[:count], rtol=1e-4, atol=1e-6)


def test_the_spec_says_which_file_it_was(path):
    spec = make_plan(model=str(path), engine="torch").spec
    assert spec.model == "pt2:backbone"
    assert spec.weights == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert spec.num_features == 6
    assert make_plan(model=path, engine="torch").spec == spec


def test_what_travels_is_small_and_the_file_verified(path, tmp_path):
    copy = tmp_path / "copy.pt2"
    shutil.copy(path, copy)
    vectorizer: Any = ImageVectorizer(model=str(copy), engine="torch", normalize=True)
    (name,) = vectorizer._plan.files
    shipped = cache.stored(name)
    assert len(cloudpickle.dumps(vectorizer._plan)) < 10_000
    copy.unlink()  # the worker has what was shipped alone
    original = shipped.read_bytes()
    shipped.write_bytes(original + b" ")
    try:
        with pytest.raises(WeightsError, match="was altered"):
            vectorizer.extract_features(PNG)
    finally:
        shipped.write_bytes(original)
    assert len(vectorizer.extract_features(PNG)) == 6


def test_preprocessing_is_of_the_programs_input_size(path, tmp_path):
    assert make_plan(model=str(path)).spec.preprocessing == INPUT_OF_32
    any_size = {**BATCH, 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    export(Mean(), tmp_path / "any.pt2", torch.zeros(2, 3, 64, 64), any_size)
    assert make_plan(model=str(tmp_path / "any.pt2")).spec.preprocessing == Preprocessing()


def test_a_program_has_its_own_input_size(path, tmp_path):
    own = ImageVectorizer(model=path, input_size=(32, 32)).spec
    assert own == ImageVectorizer(model=path).spec
    for size in (64, (32, 48)):
        with pytest.raises(OptionError, match="input_size=.* is not valid: .* only takes 32"):
            ImageVectorizer(model=path, input_size=size)
    export(Mean(), tmp_path / "wide.pt2", torch.zeros(2, 3, 32, 48), BATCH)
    wide = ImageVectorizer(model=tmp_path / "wide.pt2")
    assert wide.spec.preprocessing == Preprocessing(resize_size=(36, 54), crop_size=(32, 48))
    assert wide.extract_features(PNG) is not None


def test_a_program_of_any_size_takes_another(tmp_path):
    any_size = {**BATCH, 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    export(Mean(), tmp_path / "any.pt2", torch.zeros(2, 3, 64, 64), any_size)
    vectorizer = ImageVectorizer(model=tmp_path / "any.pt2", input_size=(70, 140))
    expected = Preprocessing(resize_size=(80, 160), crop_size=(70, 140))
    assert vectorizer.spec.preprocessing == expected
    assert vectorizer.extract_features(PNG) is not None


def test_it_can_be_registered_with_its_preprocessing(path):
    preprocessing = Preprocessing(resize_size=40, crop_size=32, mean=(0.5, 0.5, 0.5))
    register_model("exported", path, preprocessing=preprocessing)
    spec = make_plan(model="exported").spec
    assert (spec.model, spec.preprocessing) == ("exported", preprocessing)
    register_model("exported too large", str(path), preprocessing=Preprocessing())
    with pytest.raises(OptionError, match="crop_size=224 is not valid: backbone.pt2 takes 32"):
        make_plan(model="exported too large")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"layer": "logits"}, "layer='logits' is not valid.*'pooled'"),
        ({"layer": ("pooled", "fc")}, "layer=.*'pooled'"),
        ({"weights": "random"}, "weights='random' is not valid: backbone.pt2 contains"),
        ({"model": "no/such.pt2"}, "no/such.pt2': no such file"),
    ],
    ids=lambda option: next(iter(option)) if isinstance(option, dict) else "",
)
def test_a_wrong_option_is_refused(path, option, message):
    with pytest.raises(OptionError, match=message):
        ImageVectorizer(**{"model": str(path), **option})


def test_openvino_does_not_run_it(path):
    pytest.importorskip("openvino")
    with pytest.raises(OptionError, match="backbone.pt2: use engine='torch'"):
        ImageVectorizer(model=path, engine="openvino")


@pytest.mark.parametrize(
    ("model", "image", "batch", "message"),
    [
        (Backbone(), torch.zeros(2, 3, 32, 32), None, "only takes batches of 2: export it with"),
        (Mean(), torch.zeros(2, 1, 32, 32), BATCH, "not .N, 3, H, W."),
        (Mean(), torch.zeros(2, 3, 32, 32, dtype=torch.float64), BATCH, "not one float32"),
        (nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 32, 32), BATCH, "not a tensor .N, D."),
    ],
    ids=["batch", "channels", "dtype", "output"],
)
def test_another_program_is_refused(model, image, batch, message, tmp_path):
    export(model, tmp_path / "other.pt2", image, batch)
    with pytest.raises(OptionError, match=message):
        ImageVectorizer(model=str(tmp_path / "other.pt2"))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "garbage.pt2").write_bytes(b"garbage")
    with pytest.raises(WeightsError, match="garbage.pt2 is not a torch.export file"):
        ImageVectorizer(model=str(tmp_path / "garbage.pt2"))
