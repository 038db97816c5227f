"""int8; it skips where the extra is not installed."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from imagevec import (
    ImageVecError,
    ImageVectorizer,
    OptionError,
    Preprocessing,
    WeightsError,
    quantization,
    quantize,
)
from imagevec.engines import openvino
from imagevec.models.features import FeatureModel
from imagevec.models.registry import find_source
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny
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


def model_type(saved: Path) -> str:
    """Returns NNCF's argument ``model_type``, which it writes to the graph."""
    return re.findall(r'<model_type value="(\w+)"', (saved / "model.xml").read_text())[0]


def test_attention_is_quantized_as_a_transformer(tmp_path: Path) -> None:
    """With NNCF's arguments for CNNs, the median cosine of this model is 0.945."""
    pytest.importorskip("timm")
    report = quantize(IMAGES, output=tmp_path / "vit", model="timm/test_vit", weights="random")
    assert report.median_cosine >= 0.98
    assert model_type(tmp_path / "vit") == "transformer"


def test_convolutions_are_not_quantized_as_a_transformer(saved_model: Path) -> None:
    assert model_type(saved_model) == "None"


class Products(nn.Module):
    """Multiplies the matrix of an image's mean colours by itself, or by constants."""

    constant: torch.Tensor

    def __init__(self, squared: bool, einsum: bool = False) -> None:
        super().__init__()
        self.squared, self.einsum = squared, einsum
        self.register_buffer("constant", torch.rand(1, 2, 2) @ torch.rand(1, 2, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.mean((2, 3))[:, :2, None] * images.mean((2, 3))[:, None, 1:]  # (N, 2, 2)
        other = (
            x.softmax(-1) if self.squared else self.constant.expand(x.shape[0], 2, 2).softmax(-1)
        )
        product = torch.einsum("nij,njk->nik", x, other) if self.einsum else x @ other
        return product.flatten(1)


@pytest.mark.parametrize("einsum", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_attention_is_a_product_of_what_depends_on_the_input(squared: bool, einsum: bool) -> None:
    factory = find_source(functools.partial(Products, squared, einsum))
    exact = FeatureModel(factory, weights="random", layer="logits", normalize=False)
    assert quantization._has_attention(openvino.convert(exact)) is squared


def test_a_saved_model_runs_by_its_path(saved_model: Path) -> None:
    vector = vector_of(IMAGES[0], engine="auto", model=str(saved_model))
    exact = vector_of(IMAGES[0], model=tiny, weights="random")
    assert 0.99 <= cosine(vector, exact) < 1
    for precision in ("int8", "auto"):
        options: dict[str, Any] = {"model": str(saved_model), "precision": precision}
        assert vector_of(IMAGES[0], engine="auto", **options) == vector


def test_what_a_saved_model_fixes_cannot_be_changed(saved_model: Path) -> None:
    fixed: list[dict[str, Any]]
    fixed = [{"layer": "logits"}, {"precision": "bfloat16"}, {"weights": "random"}]
    for options in fixed:
        with pytest.raises(OptionError, match=f"{next(iter(options))}="):
            ImageVectorizer(model=str(saved_model), **options)
    with pytest.raises(OptionError, match="torch cannot run .*: use engine='openvino'"):
        ImageVectorizer(model=str(saved_model), engine="torch")


def test_another_input_size_is_quantized(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    options: dict[str, Any] = {"model": tiny, "weights": "random", "input_size": (64, 96)}
    assert quantize(IMAGES, output=folder, **options).median_cosine >= 0.99
    spec = ImageVectorizer(model=str(folder)).spec
    assert spec.preprocessing == Preprocessing().with_input_size((64, 96))
    assert ImageVectorizer(model=str(folder), input_size=[64, 96]).spec == spec
    vector = vector_of(IMAGES[0], engine="auto", model=str(folder))
    assert 0.99 <= cosine(vector, vector_of(IMAGES[0], **options)) < 1
    for size in (64, 224, (96, 64)):
        with pytest.raises(OptionError, match=r"input_size=.* only takes \(64, 96\)"):
            ImageVectorizer(model=str(folder), input_size=size)


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
    with pytest.raises(ImageVecError, match="int8 model not saved"):
        quantize(IMAGES, output=tmp_path / "new", model=tiny, weights="random", min_median_cosine=1)
    assert not (tmp_path / "new").exists()


class Dead(Tiny):
    """Returns zeros for every image."""

    bias = -1e6

    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.constant_(cast(torch.Tensor, self.conv.bias), self.bias)


class Overflowing(Dead):
    bias = torch.inf


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Dead, "not saved: 3 of 3 float32 .* zero or not finite"),
        (Overflowing, "the weights .* are not finite: 'conv.bias'; 3 of 3 vectors contain infinit"),
    ],
)
@pytest.mark.parametrize("min_median_cosine", [0.98, -1])
def test_zero_and_infinite_vectors_are_refused(
    model: Any, reason: str, min_median_cosine: float, tmp_path: Path
) -> None:
    with pytest.raises(ImageVecError, match=reason):
        quantize(
            IMAGES,
            output=tmp_path / "new",
            model=model,
            weights="random",
            min_median_cosine=min_median_cosine,
        )
    assert not (tmp_path / "new").exists()


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 of 3 images can be decoded"):
        quantize([*IMAGES[:2], b""], output=tmp_path / "new", model=tiny, weights="random")
    with pytest.raises(OptionError, match="already exists"):
        quantize(IMAGES, output=tmp_path, model=tiny, weights="random")


def test_int8_without_a_saved_model_says_how_to_make_one() -> None:
    with pytest.raises(OptionError, match=r"imagevec\.quantize\("):
        ImageVectorizer(model=tiny, weights="random", precision="int8")


def test_images_are_a_list_of_paths_or_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        path.write_bytes(image)
    report = quantize(paths, output=tmp_path / "new", model=tiny, weights="random")
    assert report.calibration_images == 12
    singles: list[Any] = [str(paths[0]), paths[0], IMAGES[0]]
    for single in singles:
        with pytest.raises(OptionError, match="use a list of images"):
            quantize(single, output=tmp_path / "other", model=tiny, weights="random")


def test_a_data_frame_has_one_column(tmp_path: Path) -> None:
    class Frame:
        columns = ("path", "content")

    with pytest.raises(OptionError, match="use a data frame with one"):
        quantize(Frame(), output=tmp_path / "new", model=tiny, weights="random")  # type: ignore[arg-type]


@pytest.mark.parametrize("floor", [1.01, -2, float("nan"), "high", None])
def test_a_floor_that_makes_no_sense_is_refused_before_the_work(floor: Any, tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("the model was built")

    with pytest.raises(OptionError, match="min_median_cosine="):
        quantize(
            IMAGES, output=tmp_path / "new", model=never, weights="random", min_median_cosine=floor
        )


def test_a_saved_model_names_its_backend(saved_model: Path, tmp_path: Path) -> None:
    content = json.loads((saved_model / "spec.json").read_text())
    assert content["backend"] == "openvino"
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes((saved_model / name).read_bytes())
    (tmp_path / "spec.json").write_text(json.dumps({**content, "backend": "another"}))
    with pytest.raises(WeightsError, match="runs with 'another'"):
        ImageVectorizer(model=str(tmp_path))


def test_a_saved_model_runs_on_the_cpu_where_tasks_have_gpus(saved_model: Path) -> None:
    plan = make_plan(gpus=True, model=str(saved_model))
    assert (plan.backend, plan.execution.device) == ("openvino", "cpu")
    with pytest.raises(OptionError, match="runs on the CPU, not on device='cuda'"):
        make_plan(model=str(saved_model), device="cuda")


def test_a_folder_that_is_no_saved_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such folder"):
        ImageVectorizer(model=str(tmp_path / "moved"))
    with pytest.raises(OptionError, match="is not a saved model"):
        ImageVectorizer(model=str(tmp_path))
