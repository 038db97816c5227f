from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imagevec import FeatureSpec, ImageVectorizer, OptionError, Preprocessing, runtime
from imagevec.plan import devices, has_cuda, make_plan
from imagevec.runtime import device_here, get_engine, schedule, threads_here
from tests.helpers.factories import logging_tiny, tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import run_python, spec_of


class FakeEngine:
    precision = ""


class FakePlan:
    """Counts how often its engine is built, by a backend that is itself."""

    source = None
    engine_files = ()

    def __init__(self, key: str, precision: str = "float32", native: bool = True) -> None:
        self.key = key
        self.backend = self
        self.spec = dataclasses.replace(spec_of(Preprocessing()), precision=precision)
        self.has_bfloat16 = {"cpu": native, "cuda:0": not native}.__getitem__
        self.engines: list[weakref.ref] = []

    def load(self, spec: FeatureSpec, *args: object) -> FakeEngine:
        engine = FakeEngine()
        engine.precision = spec.precision
        self.engines.append(weakref.ref(engine))
        return engine


@pytest.fixture(autouse=True)
def fake_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtime.backend
    monkeypatch.setattr(runtime, "backend", lambda b: real(b) if isinstance(b, str) else b)


def engine_of(plan: Any, device: str = "cpu", threads: int = 1) -> Any:
    return get_engine(plan, Path, device, threads)


def test_an_engine_is_built_once():
    plan = FakePlan("once")
    assert engine_of(plan) is engine_of(plan) is engine_of(FakePlan("once"))
    assert len(plan.engines) == 1


def test_each_device_has_its_own_engine():
    plan = FakePlan("devices")
    assert engine_of(plan, "cpu") is not engine_of(plan, "cuda:0")
    assert engine_of(plan, "cuda:1") is not engine_of(plan, "cuda:0")


def test_bfloat16_without_instructions_for_it_is_float32(caplog):
    plan: Any = FakePlan("emulated", "bfloat16", native=False)
    assert runtime.precision_here(plan, "cpu") == engine_of(plan).precision == "float32"
    (record,) = caplog.records
    assert "finds no bfloat16 instructions to use on this machine's CPU" in record.message
    assert runtime.precision_here(plan, "cuda:0") == "bfloat16"
    assert plan.spec.precision == "bfloat16"


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_other_precisions_stay_as_they_are(precision):
    assert engine_of(FakePlan(precision, precision, native=False)).precision == precision


def test_each_number_of_threads_has_its_own_engine():
    plan = FakePlan("threads")
    assert engine_of(plan, threads=1) is not engine_of(plan, threads=2)
    assert engine_of(plan, threads=2) is engine_of(plan, threads=2)


def test_the_heap_is_frozen_when_an_engine_was_built_and_not_again():
    plan: Any = FakePlan("frozen")
    frozen: list[Any] = []
    for _ in range(3):
        get_engine(plan, Path, "cpu", 1, when_built=lambda: frozen.append(plan))
    assert len(frozen) == 1


def test_a_frozen_heap_is_not_walked():
    printed = run_python("""
import gc
from imagevec.runtime import freeze_heap
kept = [[] for _ in range(100_000)]
before = len(gc.get_objects())
freeze_heap()
print(before > 100_000, len(gc.get_objects()) < 1000, gc.get_freeze_count() > 100_000)
""")
    assert printed.split() == ["True"] * 3


def test_only_a_few_engines_are_kept():
    plans = [FakePlan(f"many {number}") for number in range(12)]
    for plan in plans:
        engine_of(plan)
    gc.collect()
    kept = [plan.key for plan in plans if plan.engines[0]() is not None]
    assert 1 <= len(kept) <= 6
    assert kept == [plan.key for plan in plans[-len(kept) :]]


def test_an_engine_that_was_frozen_is_freed_when_it_is_dropped():
    """It refers to itself, as the modules of ``torch.fx`` do."""
    plans: list[Any] = [FakePlan(f"frozen {number}") for number in range(12)]
    try:
        for plan in plans:
            engine = get_engine(plan, Path, "cpu", 1, when_built=runtime.freeze_heap)
            engine.itself = engine  # type: ignore[attr-defined]
        del engine
        assert sum(plan.engines[0]() is not None for plan in plans) <= 6
    finally:
        gc.unfreeze()


def test_the_engine_in_use_is_not_dropped():
    used = FakePlan("in use")
    for number in range(12):
        engine_of(used)
        engine_of(FakePlan(f"passing {number}"))
    assert len(used.engines) == 1


def test_an_engine_that_cannot_be_built_is_tried_again():
    plan: Any = FakePlan("fails")
    plan.load, build = lambda *args: 1 / 0, plan.load
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            engine_of(plan)
    plan.load = build
    assert engine_of(plan) is plan.engines[0]()


def test_a_factory_is_called_once_for_each_plan_and_each_engine(tmp_path):
    log = tmp_path / "built"
    options: dict[str, Any]
    options = {"model": functools.partial(logging_tiny, str(log)), "engine": "torch"}
    vectorizer = ImageVectorizer(**options)
    assert len(log.read_text().split()) == 1
    for seed in range(3):
        vectorizer.extract_features(encode(photo(seed=seed)))
    assert len(log.read_text().split()) == 2
    ImageVectorizer(**options)
    assert len(log.read_text().split()) == 3


def test_an_openvino_engine_does_not_call_the_factory(tmp_path):
    pytest.importorskip("openvino")
    log = tmp_path / "built"
    model = functools.partial(logging_tiny, str(log))
    vectorizer = ImageVectorizer(model=model, engine="openvino")
    vectorizer.extract_features(encode(photo()))
    assert len(log.read_text().split()) == 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagevec.plan._has_gpu_driver", lambda: True)
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
        ("cuda", (), "cuda:0"),
        ("cuda", ("1", "0"), "cuda:1"),
        ("cuda:1", (), "cuda:1"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_device_is_the_one_that_is_asked_for_or_assigned(device, addresses, expected):
    assert device_here(device, addresses) == expected


@pytest.mark.parametrize(
    ("visible", "address", "expected"),
    [
        ("", "GPU-b1", "cuda:1"),
        ("GPU-b1,GPU-a0", "GPU-b1", "cuda:0"),
        ("MIG-7", "MIG-7", "cuda:0"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_may_be_assigned_by_its_uuid(monkeypatch, visible, address, expected):
    properties = [SimpleNamespace(uuid="a0"), SimpleNamespace(uuid="b1")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_here("cuda", (address,)) == expected
    with pytest.raises(OptionError, match="'MIG-8'.*GPU-a0, GPU-b1.*CUDA_VISIBLE_DEVICES"):
        device_here("cuda", ("MIG-8",))


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_the_gpu_that_is_here():
    assert devices("auto") == ("cuda", "cpu")
    assert devices("cpu") == ("cpu",)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_unless_tasks_have_gpus():
    assert devices("auto") == ("cpu",)
    assert devices("auto", gpus=True) == ("cuda", "cpu")


def test_pytorch_is_not_imported_to_learn_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("imagevec.plan._has_gpu_driver", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    assert not has_cuda()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_never_replaced(device):
    with pytest.raises(OptionError, match=rf"device='{device}.*finds 0 CUDA.*'cpu' or 'auto'"):
        device_here(device)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_is_refused():
    with pytest.raises(OptionError, match="device='cuda:2' is not available: PyTorch finds 2 CUDA"):
        device_here("cuda:2")


def test_threads_follow_the_quota_unless_the_user_sets_them(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("imagevec.engines.devices.cpu_quota", lambda root: 0.5)
    assert threads_here() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_here() == 3


@pytest.mark.parametrize(
    ("input_size", "images"), [(224, 8), ((112, 448), 8), (448, 2), ((32, 56), 224), (2000, 1)]
)
def test_auto_batch_size_follows_the_pixels_of_the_input(input_size, images):
    options: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
    assert schedule(make_plan(**options, input_size=input_size), "cpu", 1).batch_size == images


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("task_cpus", [1, 2, 8])
def test_no_more_threads_than_cores(engine, task_cpus):
    if engine == "openvino":
        pytest.importorskip("openvino")
    options = {"model": "squeezenet1_1", "weights": "random", "engine": engine}
    how = schedule(make_plan(**options), "cpu", task_cpus)
    assert 1 <= how.forward_threads <= task_cpus
    assert 1 <= how.decode_threads <= task_cpus
    assert not how.overlap
    assert how.batch_size >= 1
    assert schedule(make_plan(**options, batch_size=5), "cpu", task_cpus).batch_size == 5
    assert schedule(make_plan(**options), "cuda:0", task_cpus).overlap
