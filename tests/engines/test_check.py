"""Models that are no functions of an image, and models that a converter changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imagevec import ImageVecError, OptionError, Preprocessing, WeightsError, cache, register_model
from imagevec.engines.check import Reference, check_conversion
from imagevec.engines.torch_engine import TorchEngine
from imagevec.models.factory import FactorySource
from imagevec.models.features import FeatureModel
from imagevec.models.registry import find_source
from imagevec.models.source import REGISTERED, ConversionError
from imagevec.plan import Plan, make_plan
from imagevec.runtime import get_engine
from tests.helpers.images import cosine, photo
from tests.helpers.pipeline import pixels_of

SMALL = Preprocessing(resize_size=32, crop_size=32)


class Net(nn.Module):
    """Maps ``(N, 3, 32, 32)`` to ``(N, 8)``. Subclasses change what is before and after."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, kernel_size=5, stride=4)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.before(images)
        features: torch.Tensor = self.norm(self.conv(pixels)).relu().mean((2, 3))
        return self.after(features, images)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def after(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y


Kind = type[Net]


def kinds(*classes: Kind) -> Any:
    return pytest.mark.parametrize("kind", classes, ids=lambda kind: kind.__name__)


class ViewOfInt(Net):
    def after(self, y, x):
        return y.view(int(y.shape[0]), -1)


class BranchOnMean(Net):
    def before(self, x):
        return x if x.mean() > 0 else -x


class BranchOnFirstPixel(Net):
    def after(self, y, x):
        return 2 * y if bool(x[0, 0, 0, 0] > 0) else y


class IntOfArgmax(Net):
    def after(self, y, x):
        return torch.stack([row * (int(row.argmax()) + 1) for row in y])


class ItemOfEachImage(Net):
    def after(self, y, x):
        return torch.stack([y[i] * x[i].mean().item() for i in range(len(x))])


class LoopOverInt(Net):
    def after(self, y, x):
        return torch.cat([y[i : i + 1] * 2 for i in range(int(x.shape[0]))])


class ZerosOfLen(Net):
    def after(self, y, x):
        return y + torch.ones(len(y), 8)


class WhileOfEachImage(Net):
    def after(self, y, x):
        rows = []
        for row in y:
            while row.norm() > 0.5:
                row = row / 2
            rows.append(row)
        return torch.stack(rows)


class NumPy(Net):
    def after(self, y, x):
        return y * torch.from_numpy(y.numpy().max(1, keepdims=True))


class WithoutRule(Net):
    """OpenVINO has no rule to convert ``affine_grid``."""

    def before(self, x):
        theta = torch.eye(2, 3).expand(x.shape[0], 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), align_corners=False)


CHANGED = [
    ViewOfInt,
    BranchOnMean,
    BranchOnFirstPixel,
    IntOfArgmax,
    ItemOfEachImage,
    LoopOverInt,
    ZerosOfLen,
    WhileOfEachImage,
    NumPy,
    WithoutRule,
]


class ShapeOfBatch(Net):
    def after(self, y, x):
        return y + torch.full((x.shape[0], 8), 0.5)


class OfEachImage(Net):
    def before(self, x):
        return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)


class Where(Net):
    def after(self, y, x):
        return torch.where(x.mean((1, 2, 3))[:, None] > 0, y, -y)


class TopK(Net):
    def after(self, y, x):
        return y.topk(4, dim=1)[0].repeat(1, 2)


class Resized(Net):
    def before(self, x):
        return F.interpolate(x, scale_factor=0.5, mode="bilinear")


class Spectrum(Net):
    def before(self, x):
        return torch.fft.rfft2(x).abs()


class InPlace(Net):
    def before(self, x):
        return x.mul_(2).add_(1)


class ReadsTraining(Net):
    def after(self, y, x):
        return y * 2 if self.training else y


class CacheOfBatchSize(Net):
    positions: Any = None

    def after(self, y, x):
        if self.positions is None or len(self.positions) != len(y):
            self.positions = torch.ones(len(y), 8)
        return y * self.positions[:1]


class KeepsFeatures(Net):
    def after(self, y, x):
        self.last = y
        return y


class Zero(Net):
    def after(self, y, x):
        return y * 0


class Small(Net):
    def after(self, y, x):
        return y * 1e-30


class Large(Net):
    def after(self, y, x):
        return y * 1e30


class NearlyConstant(Net):
    def after(self, y, x):
        return y * 1e-9 + torch.arange(8.0)


UNCHANGED = [
    Net,
    ShapeOfBatch,
    OfEachImage,
    Where,
    TopK,
    Resized,
    Spectrum,
    InPlace,
    ReadsTraining,
    CacheOfBatchSize,
    KeepsFeatures,
    Zero,
    Small,
    Large,
    NearlyConstant,
]


class Dropout(Net):
    def after(self, y, x):
        return F.dropout(y, 0.1)


class DropoutModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def after(self, y, x):
        return self.drop.train()(y)


class Noise(Net):
    def after(self, y, x):
        return y + 0.1 * torch.randn_like(y)


class RandomOrder(Net):
    def after(self, y, x):
        return y[:, torch.randperm(8)]


class PythonRandom(Net):
    def after(self, y, x):
        return y * random.random()


class Counter(Net):
    calls = 0

    def after(self, y, x):
        self.calls += 1
        return y * self.calls


class Memory(Net):
    last: Any = 0

    def after(self, y, x):
        self.last, before = y.mean(0), self.last
        return y + before


RANDOM = [Dropout, DropoutModule, Noise, RandomOrder, PythonRandom, Counter, Memory]


class BatchNormWithoutStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class BatchNormInTraining(Net):
    def before(self, x):
        self.norm.train()
        return x


class MinusMeanOfBatch(Net):
    def after(self, y, x):
        return y - y.mean(0)


class TimesMeanOfBatch(Net):
    def after(self, y, x):
        return y * x.mean().item()


class DividedByMaximum(Net):
    def before(self, x):
        return x / x.abs().max()


class DimensionZero(Net):
    def after(self, y, x):
        return F.normalize(y, dim=0)


class Rolled(Net):
    def after(self, y, x):
        return y.roll(1, 0)


class Mixed(Net):
    def after(self, y, x):
        return y.t().reshape(-1, 8)


OF_BATCH = [
    BatchNormWithoutStatistics,
    BatchNormInTraining,
    MinusMeanOfBatch,
    TimesMeanOfBatch,
    DividedByMaximum,
    DimensionZero,
    Rolled,
    Mixed,
]


class OneVector(Net):
    def after(self, y, x):
        return y.mean(0, keepdim=True)


class OneImage(Net):
    def after(self, y, x):
        if len(x) > 1:
            raise ValueError("one at a time")
        return y


class RunningMean(Net):
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def after(self, y, x):
        self.mean.mul_(0.999).add_(0.001 * x.abs().mean())
        return y / self.mean


class NoNumber(Net):
    def after(self, y, x):
        return (y - 1e3).log()


class Scratch(Net):
    """Returns a view of its own memory, which the next forward pass overwrites."""

    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(64, 8), persistent=False)

    def after(self, y, x):
        self.memory[: len(y)] = y
        return self.memory[: len(y)]


def feature_model(kind: Callable[[], nn.Module], **options: Any) -> FeatureModel:
    defaults: dict[str, Any]
    defaults = {"weights": "DEFAULT", "layer": "logits", "normalize": False}
    return FeatureModel(FactorySource(kind, SMALL), **{**defaults, **options})


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def plan() -> Iterator[Callable[..., Plan]]:
    """Returns a function that plans for a class of this file, with images of 32 x 32 pixels."""

    def planned(kind: Callable[[], nn.Module], **options: Any) -> Plan:
        REGISTERED.pop("kind", None)
        register_model("kind", kind, preprocessing=SMALL)
        return make_plan(model="kind", **{"layer": "logits", **options})

    yield planned
    REGISTERED.pop("kind", None)


def images(count: int) -> np.ndarray:
    return np.stack([pixels_of(photo(32, 32, seed)) for seed in range(count)])


def by_itself(kind: Kind, batch: np.ndarray) -> np.ndarray:
    """Computes the vectors of single images, by a new model."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (SMALL.mean, SMALL.std))
    pixels = (torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        model = kind().eval()
        return np.concatenate([model(pixels[i : i + 1]).numpy().copy() for i in range(len(batch))])


def check_vectors(plan: Plan, kind: Kind, batch_size: int) -> None:
    engine = get_engine(plan, cache.stored, "cpu", threads=1)
    batch = images(6)
    vectors = np.concatenate([engine(each) for each in np.split(batch, 6 // batch_size)])
    expected = by_itself(kind, batch)
    np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@kinds(*CHANGED)
def test_model_that_a_conversion_changes_runs_with_pytorch(kind, plan, caplog):
    with pytest.raises(OptionError, match="openvino cannot convert 'kind'"):
        plan(kind, engine="openvino")
    found = plan(kind)
    assert found.backend == "torch"
    assert "openvino cannot convert 'kind'" in caplog.text
    branches = kind in (BranchOnMean, BranchOnFirstPixel)
    assert ("batch_size=1" in caplog.text) is branches
    check_vectors(found, kind, 1 if branches else 3)


@kinds(*UNCHANGED)
def test_model_that_a_conversion_keeps_is_accepted(kind, plan, caplog):
    for name in ("openvino", "torch"):
        found = plan(kind, engine=name)
        check_vectors(found, kind, 3)
    assert "convert" not in caplog.text


@pytest.mark.parametrize("engine", ["auto", "openvino", "torch"])
@kinds(*RANDOM)
def test_model_whose_vectors_change_is_refused(kind, engine, plan):
    with pytest.raises(OptionError, match="'kind' is not valid: two runs on the same images"):
        plan(kind, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "openvino", "torch"])
@kinds(*OF_BATCH)
def test_model_whose_vectors_depend_on_the_batch_is_refused(kind, engine, plan):
    with pytest.raises(OptionError, match="'kind' is not valid: the vector of one image depends"):
        plan(kind, engine=engine)


@pytest.mark.parametrize(
    ("kind", "submodule"),
    [
        (DropoutModule, r"'drop' \(Dropout\)"),
        (BatchNormInTraining, r"'norm' \(BatchNorm2d\)"),
        (DividedByMaximum, r"'conv' \(Conv2d\)"),
    ],
)
def test_first_submodule_whose_output_changes_is_named(kind, submodule, plan):
    with pytest.raises(OptionError, match=f"first in the output of {submodule}"):
        plan(kind, engine="torch")


def test_place_where_tracing_fixed_a_value_is_named(plan):
    line = BranchOnMean.before.__code__.co_firstlineno + 1
    with pytest.raises(OptionError, match=rf"test_check\.py:{line}: .*to a Python boolean"):
        plan(BranchOnMean, engine="openvino")


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_another_number_of_vectors_is_refused(engine, plan):
    with pytest.raises(OptionError, match=r"shape \(1, 8\), not \(3, 8\)|\(1, 8\)"):
        plan(OneVector, engine=engine)


def test_error_for_a_batch_is_the_models(plan):
    with pytest.raises(OptionError, match="fails for a batch of 3 images .ValueError: one at a ti"):
        plan(OneImage, engine="torch")


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_slowly_changing_buffer_is_refused(engine, plan):
    with pytest.raises(OptionError, match="each forward pass changes its buffer 'mean'"):
        plan(RunningMean, engine=engine)


def test_view_of_the_models_own_memory_is_accepted(plan):
    check_vectors(plan(Scratch, engine="torch"), Scratch, 3)


@pytest.mark.parametrize("engine", ["auto", "openvino", "torch"])
@pytest.mark.parametrize(
    ("number", "found"), [(np.nan, "NaN"), (np.inf, "infinity")], ids=["nan", "inf"]
)
def test_weights_that_are_not_finite_are_named(number, found, engine, plan):
    def broken() -> nn.Module:
        model = Net()
        with torch.no_grad():
            model.conv.weight[0, 0, 0, 0] = number
        return model

    match = f"the weights of 'kind' are not finite: 'conv.weight'; . of 3 vectors contain {found}"
    with pytest.raises(WeightsError, match=match):
        plan(broken, engine=engine)


def test_vectors_that_are_not_finite_are_refused(plan):
    with pytest.raises(OptionError, match="3 of 3 vectors contain NaN, although its weights are"):
        plan(NoNumber, engine="torch")


def test_nan_in_weights_that_are_not_used_is_accepted(plan):
    def unused() -> nn.Module:
        model = Net()
        model.unused = nn.Linear(2, 2)
        nn.init.constant_(model.unused.weight, np.nan)
        return model

    assert plan(unused).backend == "openvino"


class TwoLayers(nn.Module):
    """The vectors of the first layer are a thousandth of those of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Identity(), Net()

    def forward(self, images):
        small = self.small(images.mean((2, 3)) * 1e-3)
        return self.large(images) + small.sum(1, keepdim=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_each_of_several_layers_is_compared(normalize):
    model = feature_model(TwoLayers, layer=("small", "large"), normalize=normalize)
    sizes = model.spec.sizes
    assert sizes == (3, 8)

    engine = TorchEngine(model.module, SMALL, "cpu", "float32")
    check_conversion(model, lambda threads: engine)

    def changed(inputs: np.ndarray) -> np.ndarray:
        return engine(inputs) * np.repeat([1.1, 1], sizes).astype(np.float32)

    with pytest.raises(ConversionError, match="differs from PyTorch"):
        check_conversion(model, lambda threads: changed)


@pytest.mark.parametrize(
    "change",
    {
        "scaled": lambda vectors: vectors * 1.02,
        "rotated": lambda vectors: np.roll(vectors, 1, axis=1),
        "reordered": lambda vectors: np.roll(vectors, 1, axis=0),
        "NaN": lambda vectors: np.where(np.arange(8) == 3, np.nan, vectors),
        "fewer rows": lambda vectors: vectors[:-1],
        "fewer columns": lambda vectors: vectors[:, :-1],
        "flat": lambda vectors: vectors.reshape(-1),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("kind", [Net, NearlyConstant])
def test_any_difference_is_found(change, kind):
    if kind is NearlyConstant and change[0] == "reordered":
        return  # all its vectors are equal up to rounding errors
    model = feature_model(kind)
    engine = TorchEngine(model.module, SMALL, "cpu", "float32")
    check_conversion(model, lambda threads: engine)

    def changed(inputs: np.ndarray) -> np.ndarray:
        return change[1](engine(inputs)).astype(np.float32)

    with pytest.raises(ConversionError, match="differs from PyTorch"):
        check_conversion(model, lambda threads: changed)


@pytest.mark.parametrize("wrong", [1, 2, 3, 8])
def test_batches_of_1_2_3_and_8_are_compared(wrong):
    model = feature_model(Net)
    engine = TorchEngine(model.module, SMALL, "cpu", "float32")

    def changed(inputs: np.ndarray) -> np.ndarray:
        return engine(inputs) * (2 if len(inputs) == wrong else 1)

    with pytest.raises(ConversionError, match=f"for a batch of {wrong}, it differs"):
        check_conversion(model, lambda threads: changed)


def test_lack_of_memory_is_no_difference():
    def engine(inputs: np.ndarray) -> np.ndarray:
        raise MemoryError("too little")

    with pytest.raises(MemoryError, match="too little"):
        check_conversion(feature_model(Net), lambda threads: engine)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "timm/test_vit", "timm/test_resnet"])
@pytest.mark.parametrize("normalize", [False, True])
def test_models_of_libraries_are_functions(name, normalize):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    options: dict[str, Any] = {"layer": "pooled", "normalize": normalize}
    model = FeatureModel(find_source(name), weights="random", **options)
    assert not Reference(model).branches


class OfTokens(nn.Module):
    """Changes the vectors of a text tower."""

    def __init__(self, tower: nn.Module, change: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.tower, self.change = tower, change

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        before = tokens.clone()
        tokens.fill_(0)  # in place
        return self.change(self.tower(before), before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda y, tokens: y, None),
        (lambda y, tokens: F.dropout(y), "two runs on the same texts differ"),
        (lambda y, tokens: y - y.mean(0), "the vector of one text depends on the others"),
        (lambda y, tokens: y * tokens.shape[1], "the vector of one text depends on the others"),
        (lambda y, tokens: y.sum(0, keepdim=True), r"shape \(1, 32\), not \(3, 32\)"),
    ],
)
def test_text_towers_are_checked_with_texts_of_different_lengths(change, match, clip):
    options: dict[str, Any] = {"layer": "pooled", "normalize": False}
    source = find_source("open_clip/tiny-vit").text_source()
    model = FeatureModel(source, weights="random", **options)
    assert model.spec.sizes == (32,)
    model.__dict__["module"] = OfTokens(model.module, change).eval()
    if match is None:
        Reference(model)
    else:
        with pytest.raises(ImageVecError, match=match):
            Reference(model)


class TypeOfProxy(Net):
    """Computes something else under ``torch.fx``, whose values are no tensors."""

    def before(self, x):
        return x if isinstance(x, torch.Tensor) else -x


def test_batch_norms_are_folded_if_the_vectors_remain(caplog):
    caplog.set_level("INFO")
    batch = images(6)
    for kind, folded in ((Net, True), (TypeOfProxy, False), (IntOfArgmax, False)):
        caplog.clear()
        engine = TorchEngine(kind().eval(), SMALL, "cpu", "float32")
        norms = [each for each in engine._model.modules() if isinstance(each, nn.BatchNorm2d)]
        assert (norms == []) is folded
        assert ("batch norms are not folded" in caplog.text) is not folded
        assert (cosine(engine(batch), by_itself(kind, batch)) >= 0.99999).all()
