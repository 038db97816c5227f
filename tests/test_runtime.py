from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path

import pytest
import torch

from imagevec import ImageVectorizer, OptionError
from imagevec.runtime import get_engine, resolve_device, schedule
from tests.helpers.factories import logging_tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import recipe_of

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


class FakeEngine:
    pass


class FakeRecipe:
    """Counts how often its engine is built."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.engines: list[weakref.ref] = []

    def build_engine(self, *args: object, **kwargs: object) -> FakeEngine:
        engine = FakeEngine()
        self.engines.append(weakref.ref(engine))
        return engine


def engine_of(recipe: FakeRecipe, device: torch.device = CPU) -> FakeEngine:
    return get_engine(recipe, Path, device, threads=1)


def test_an_engine_is_built_once():
    recipe = FakeRecipe("once")
    assert engine_of(recipe) is engine_of(recipe) is engine_of(FakeRecipe("once"))
    assert len(recipe.engines) == 1


def test_each_device_has_its_own_engine():
    recipe = FakeRecipe("devices")
    assert engine_of(recipe, CPU) is not engine_of(recipe, CUDA)
    assert engine_of(recipe, torch.device("cuda:1")) is not engine_of(recipe, CUDA)


def test_only_a_few_engines_are_kept():
    recipes = [FakeRecipe(f"many {number}") for number in range(12)]
    for recipe in recipes:
        engine_of(recipe)
    gc.collect()
    kept = [recipe.key for recipe in recipes if recipe.engines[0]() is not None]
    assert 1 <= len(kept) <= 6
    assert kept == [recipe.key for recipe in recipes[-len(kept) :]]


def test_the_engine_in_use_is_not_dropped():
    used = FakeRecipe("in use")
    for number in range(12):
        engine_of(used)
        engine_of(FakeRecipe(f"passing {number}"))
    assert len(used.engines) == 1


def test_an_engine_that_cannot_be_built_is_tried_again():
    recipe = FakeRecipe("fails")
    recipe.build_engine, build = lambda *args: 1 / 0, recipe.build_engine
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            engine_of(recipe)
    recipe.build_engine = build
    assert engine_of(recipe) is recipe.engines[0]()


def test_a_model_is_built_once_for_many_images(tmp_path):
    log = tmp_path / "built"
    factory = functools.partial(logging_tiny, str(log))
    vectorizer = ImageVectorizer(model=factory, weights="random", engine="torch")
    built_to_resolve = len(log.read_text().split())
    for seed in range(3):
        vectorizer.extract_features(encode(photo(seed=seed)))
    ImageVectorizer(model=factory, weights="random", engine="torch", output="struct")
    assert len(log.read_text().split()) - built_to_resolve == 1 + built_to_resolve


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("device", "addresses", "expected"),
    [
        ("cpu", (), "cpu"),
        ("cpu", ("1",), "cpu"),
        ("auto", (), "cuda:0"),
        ("auto", ("1",), "cuda:1"),
        ("cuda", (), "cuda:0"),
        ("cuda", ("1", "0"), "cuda:1"),
        ("cuda:1", (), "cuda:1"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_device_is_the_one_that_is_asked_for_or_assigned(device, addresses, expected):
    assert resolve_device(device, addresses) == torch.device(expected)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu():
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_never_replaced(device):
    with pytest.raises(OptionError, match=rf"device='{device}.*finds 0 CUDA.*'cpu' or 'auto'"):
        resolve_device(device)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_is_refused():
    with pytest.raises(OptionError, match="device='cuda:2' is not there: PyTorch finds 2 CUDA"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("task_cpus", [1, 2, 8])
def test_no_more_threads_than_cores(engine, task_cpus):
    if engine == "openvino":
        pytest.importorskip("openvino")
    recipe = recipe_of(model="squeezenet1_1", weights="random", engine=engine)
    plan = schedule(recipe, "auto", CPU, task_cpus)
    assert 1 <= plan.forward_threads <= task_cpus
    assert 1 <= plan.decode_threads <= task_cpus
    assert not plan.overlap
    assert plan.batch_size >= 1
    assert schedule(recipe, 5, CPU, task_cpus).batch_size == 5
