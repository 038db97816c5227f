"""int8; it skips where the extra is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagevec import ImageVecError, ImageVectorizer, OptionError, WeightsError, quantize
from tests.helpers.factories import tiny
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import vector_of

pytest.importorskip("nncf")

IMAGES = [encode(photo(64 + i, 64, seed=i), "JPEG") for i in range(15)]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    report = quantize([*IMAGES, b"no image"], output=folder, model=tiny, weights="random")
    assert (report.held_out_images, report.calibration_images, report.bad_images) == (3, 12, 1)
    assert report.median_cosine >= 0.99
    return folder


def test_a_saved_model_runs_by_its_path(saved_model: Path) -> None:
    vector = vector_of(IMAGES[0], engine="auto", model=str(saved_model))
    exact = vector_of(IMAGES[0], model=tiny, weights="random")
    assert 0.99 <= cosine(vector, exact) < 1
    assert vector_of(IMAGES[0], engine="auto", model=str(saved_model), precision="int8") == vector


def test_what_a_saved_model_fixes_cannot_be_changed(saved_model: Path) -> None:
    for options in ({"layer": "logits"}, {"precision": "bfloat16"}, {"weights": "random"}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}="):
            ImageVectorizer(model=str(saved_model), **options)  # type: ignore[typeddict-item]
    with pytest.raises(OptionError, match="engine='openvino' and device='cpu' alone"):
        ImageVectorizer(model=str(saved_model), engine="torch")


def test_a_saved_model_that_was_altered_is_refused(saved_model: Path, tmp_path: Path) -> None:
    for name in ("spec.json", "model.xml", "model.bin"):
        (tmp_path / name).write_bytes((saved_model / name).read_bytes())
    (tmp_path / "model.bin").write_bytes(b"other weights")
    with pytest.raises(WeightsError, match="model.bin was altered"):
        ImageVectorizer(model=str(tmp_path))
    content = json.loads((tmp_path / "spec.json").read_text())
    content["spec"]["normalize"] = True
    (tmp_path / "spec.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="fingerprint does not match"):
        ImageVectorizer(model=str(tmp_path))


def test_nothing_is_saved_below_the_floor(tmp_path: Path) -> None:
    with pytest.raises(ImageVecError, match="int8 is not saved"):
        quantize(
            IMAGES, output=tmp_path / "new", model=tiny, weights="random", min_median_cosine=1.01
        )
    assert not (tmp_path / "new").exists()


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 of 3 images can be decoded"):
        quantize([*IMAGES[:2], b""], output=tmp_path / "new", model=tiny, weights="random")
    with pytest.raises(OptionError, match="exists already"):
        quantize(IMAGES, output=tmp_path, model=tiny, weights="random")


def test_int8_without_a_saved_model_says_how_to_make_one() -> None:
    with pytest.raises(OptionError, match=r"imagevec\.quantize\("):
        ImageVectorizer(model=tiny, weights="random", precision="int8")
