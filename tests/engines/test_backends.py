"""All backends, by their protocol."""

from __future__ import annotations

import inspect

import pytest

from imagevec import OptionError
from imagevec.engines import Backend, backend
from imagevec.options import ENGINES, PRECISIONS
from imagevec.plan import make_plan
from tests.helpers.factories import tiny
from tests.helpers.pipeline import run_python

FUNCTIONS = {
    name: function
    for name, function in inspect.getmembers(Backend, inspect.isfunction)
    if not name.startswith("_")
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_backend_answers_everything(name: str) -> None:
    module = backend(name)
    assert isinstance(module.BUILDS_MODULE, bool)
    assert len(FUNCTIONS) == 7
    for function, declared in FUNCTIONS.items():
        parameters = list(inspect.signature(declared).parameters)[1:]
        assert list(inspect.signature(getattr(module, function)).parameters) == parameters


@pytest.mark.parametrize("name", ENGINES)
def test_a_backend_is_asked_without_its_import(name: str) -> None:
    printed = run_python(f"""
import sys
from imagevec.engines import backend
asked = backend({name!r})
print(asked.is_available(), asked.version() != "", asked.why_not("float32", "cpu"))
print({{"torch", "openvino"}} & sys.modules.keys())
""")
    assert printed == "True True None\nset()\n"


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_what_a_backend_cannot_run_has_a_reason(name: str, precision: str, device: str) -> None:
    reason = backend(name).why_not(precision, device)
    assert reason is None or "=" in reason


def test_float16_needs_a_gpu_also_with_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagevec.plan.has_cuda", lambda: False)
    with pytest.raises(OptionError, match="precision='float16' needs CUDA"):
        make_plan(model=tiny, weights="random", precision="float16")
    plan = make_plan(gpus=True, model=tiny, weights="random", precision="float16")
    assert (plan.backend, plan.execution.device) == ("torch", "cuda")
