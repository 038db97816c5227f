"""bfloat16 on processors with and without its instructions.

OpenVINO and oneDNN use no newer instructions than two environment variables allow, so a process of
its own sees this machine as an older one. The lowest OpenVINO does not have the first of them yet.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from imagevec import ImageVectorizer
from imagevec.engines import backend
from imagevec.options import ENGINES
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import WITHOUT_BFLOAT16, run_python, vector_of

pytest.importorskip("openvino")

MODEL: dict[str, Any] = {"model": tiny, "weights": "random"}

COMPUTE = """
import json
from imagevec import ImageVectorizer
from imagevec.engines import openvino
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo

result = {"native": openvino.has_bfloat16("cpu")}
for precision in ("float32", "bfloat16", "auto"):
    vectorizer = ImageVectorizer(model=tiny, weights="random", precision=precision)
    vector = vectorizer.extract_features(encode(photo()))
    result[precision] = [vectorizer.spec.fingerprint, vector]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def without_instructions() -> Any:
    """Fingerprints and vectors by precision, from a process without bfloat16 instructions."""
    result = json.loads(run_python(COMPUTE, **WITHOUT_BFLOAT16))
    if result.pop("native"):
        pytest.skip("this OpenVINO cannot hide the instructions")
    return result


def test_bfloat16_without_its_instructions_is_float32(without_instructions: Any) -> None:
    vectors = {name: vector for name, (_, vector) in without_instructions.items()}
    assert vectors["bfloat16"] == vectors["float32"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_fingerprint_is_the_same_on_every_processor(
    precision: Any, without_instructions: Any
) -> None:
    fingerprint, _ = without_instructions[precision]
    assert ImageVectorizer(**MODEL, precision=precision).spec.fingerprint == fingerprint


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_with_its_instructions_is_bfloat16(engine: str) -> None:
    if not backend(engine).has_bfloat16("cpu"):
        pytest.skip("this CPU has no bfloat16 instructions")
    float32, bfloat16, auto = (
        vector_of(encode(photo()), engine=engine, precision=precision, **MODEL)
        for precision in ("float32", "bfloat16", "auto")
    )
    assert float32 != bfloat16 == auto


def test_each_gpu_is_asked_for_its_own_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"cuda:0": (7, 5), "cuda:1": (9, 0)}  # a T4 and an H100
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert not backend("torch").has_bfloat16("cuda:0")
    assert backend("torch").has_bfloat16("cuda:1")


@pytest.mark.parametrize(
    ("instructions", "native"),
    [({"avx512f", "avx512_vnni"}, False), ({"avx2"}, False), ({"avx512_bf16"}, True)],
    ids=["Ice Lake", "AVX2", "Zen 4"],
)
def test_pytorch_needs_the_instructions_too(
    instructions: set[str], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN alone says that it can compute bfloat16 on any CPU with AVX-512."""
    monkeypatch.setattr("imagevec.engines.devices.instructions", lambda: instructions)
    emulates = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert backend("torch").has_bfloat16("cpu") == (native and emulates)
