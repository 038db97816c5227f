from __future__ import annotations

import functools
import pickle
from typing import Any

import cloudpickle
import pytest
import torch

from imagevec import ImageVectorizer, OptionError, WeightsError, plan
from imagevec.options import ENGINES
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, logging_tiny, tiny
from tests.helpers.pipeline import saved

MODEL: dict[str, Any] = {"model": "squeezenet1_1", "weights": "random", "engine": "torch"}


def test_the_same_options_make_the_same_plan():
    assert make_plan(**MODEL) == make_plan(**MODEL)
    assert make_plan(**MODEL).key == make_plan(**MODEL).key


@pytest.mark.parametrize("factory", [tiny, Tiny, lambda: Tiny()], ids=["function", "class", "λ"])
def test_the_same_factory_makes_the_same_plan(factory, monkeypatch):
    keys = set()
    for _ in range(3):
        monkeypatch.setattr(plan, "_plans", {})  # it is not remembered, but made again
        keys.add(make_plan(model=factory, weights="random", engine="torch").key)
    assert len(keys) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "squeezenet1_0"},
        {"layer": "logits"},
        {"normalize": True},
        {"precision": "bfloat16"},
        {"decode": "scaled"},
        {"background": "white"},
        {"value_range": (0, 4095)},
        {"input_size": 160},
        {"input_size": (160, 224)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_vector_needs_another_engine(change):
    assert make_plan(**{**MODEL, **change}).key != make_plan(**MODEL).key


@pytest.mark.parametrize("size", [224, (224, 224), None])
@pytest.mark.parametrize("model", ["squeezenet1_1", tiny], ids=["name", "factory"])
def test_own_input_size_makes_the_same_spec(model, size):
    options: dict[str, Any] = {**MODEL, "model": model}
    assert make_plan(**options, input_size=size).spec == make_plan(**options).spec


def test_plans_of_other_sizes_are_remembered_apart(monkeypatch):
    sizes: list[Any] = [64, (64, 96), (96, 64)]
    specs = []
    for _ in range(2):
        monkeypatch.setattr(plan, "_plans", {})  # only the user's cache remembers them
        specs.append([make_plan(**MODEL, input_size=size).spec for size in sizes])
    assert specs[0] == specs[1]
    assert [spec.preprocessing.input_size for spec in specs[0]] == sizes
    assert len({spec.fingerprint for spec in specs[0]}) == 3


class Flat(torch.nn.Module):
    """Takes images of 32x32 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, 4)

    def forward(self, images: torch.Tensor) -> Any:
        return self.fc(images.flatten(1))


def test_a_factory_that_does_not_take_the_size_is_refused():
    with pytest.raises(OptionError, match=r"input_size=64 is not valid: .*Flat' cannot run it "):
        make_plan(model=Flat, weights="random", layer="logits", input_size=64)
    spec = make_plan(model=Flat, weights="random", layer="logits", input_size=32).spec
    assert spec.num_features == 4


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 3}, {"on_error": "raise"}, {"output": "struct"}, {"max_pixels": 9}],
    ids=lambda change: next(iter(change)),
)
def test_the_same_vector_needs_no_other_engine(change):
    assert make_plan(**MODEL, **change).key == make_plan(**MODEL).key


def test_two_factories_that_differ_in_a_number_are_told_apart():
    def factory(scale: float):
        def build():
            model: Any = Tiny()
            model.scale = scale
            return model

        return build

    keys = {
        make_plan(model=factory(scale), weights="random", engine="torch").key for scale in (1, 2)
    }
    assert len(keys) == 2


def test_the_weights_are_part_of_the_key(tmp_path):
    keys = set()
    for seed in (1, 2):
        saved(tiny, tmp_path / "weights.pth", seed)
        plan = make_plan(model=tiny, weights=str(tmp_path / "weights.pth"), engine="torch")
        keys.add(plan.key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("precision", "planned"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "bfloat16")],
)
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_plan_leaves_nothing_open_and_does_not_ask_this_processor(
    engine, precision, planned, monkeypatch
):
    for name in ENGINES:
        monkeypatch.setattr(f"imagevec.engines.{name}.has_bfloat16", lambda device: 1 / 0)
    plan = make_plan(**{**MODEL, "engine": engine}, precision=precision)
    assert plan.backend in ("torch", "openvino")
    assert plan.spec.precision == planned
    assert plan.spec.num_features == 512


@pytest.mark.parametrize("model", ["resnet50", tiny, lambda: Tiny()], ids=["name", "function", "λ"])
def test_what_travels_is_small(model):
    options = {"model": model, "weights": "random", "engine": "torch"}
    plan = make_plan(**options)
    pickled = cloudpickle.dumps(plan)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).spec == plan.spec
    assert len(cloudpickle.dumps(ImageVectorizer(**options))) < 10_000


def test_what_a_factory_raises_comes_as_it_is():
    def broken():
        raise FileNotFoundError("my checkpoint")

    for engine in ("auto", "torch"):
        with pytest.raises(FileNotFoundError, match="my checkpoint"):
            make_plan(model=broken, engine=engine)


def test_a_model_that_cannot_be_converted_runs_with_pytorch(monkeypatch, caplog, tmp_path):
    pytest.importorskip("openvino")

    def fail(model):
        raise RuntimeError("no such operation")

    monkeypatch.setattr("imagevec.engines.openvino.convert", fail)
    model = functools.partial(logging_tiny, str(tmp_path / "log"))
    assert make_plan(model=model).backend == "torch"
    assert len((tmp_path / "log").read_text().split()) == 1
    assert "openvino cannot convert" in caplog.text
    assert "no such operation" in caplog.text
    with pytest.raises(OptionError, match="openvino cannot convert.*no such operation"):
        make_plan(model=model, engine="openvino")


def test_lack_of_memory_chooses_no_other_engine(monkeypatch):
    pytest.importorskip("openvino")

    def fail(model):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("imagevec.engines.openvino.convert", fail)
    with pytest.raises(MemoryError):
        make_plan(model=lambda: Tiny())


def test_a_saved_model_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "spec.json").write_text("{}")
    with pytest.raises(WeightsError, match=rf"{tmp_path}/saved is not a saved model: KeyError"):
        make_plan(model="~/saved")
