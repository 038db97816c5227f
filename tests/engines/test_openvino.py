"""The OpenVINO engine; it skips where the extra is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imagevec import ImageVectorizer, MissingExtraError, OptionError, WeightsError, cache, plan
from imagevec.engines import openvino
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import vector_of

pytest.importorskip("openvino")


@pytest.mark.parametrize("model", ["squeezenet1_1", "mobilenet_v3_small", "vit_b_32"])
def test_float32_is_the_same_as_pytorch(model: str) -> None:
    image = encode(photo(300, 200), "JPEG")
    options = {"model": model, "weights": "random"}
    reference = vector_of(image, **options)
    assert cosine(vector_of(image, engine="openvino", **options), reference) >= 0.9999


def test_bfloat16_is_close() -> None:
    image = encode(photo(300, 200), "JPEG")
    options = {"model": "resnet18", "weights": "random"}
    reference = vector_of(image, **options)
    vector = vector_of(image, engine="openvino", precision="bfloat16", **options)
    assert cosine(vector, reference) >= 0.99


def test_it_is_what_auto_means_on_the_cpu() -> None:
    plan = make_plan(model=tiny, weights="random")
    assert plan.backend == "openvino"
    assert plan.source is None
    assert [Path(name).suffix for name in plan.files] == [".xml", ".bin"]


def test_a_graph_that_was_altered_is_refused() -> None:
    vectorizer = ImageVectorizer(model=tiny, weights="random", normalize=True)
    graph = cache.stored(vectorizer._plan.files[0])
    original = graph.read_bytes()
    graph.write_bytes(original + b" ")
    try:
        with pytest.raises(WeightsError, match="was altered"):
            vectorizer.extract_features(encode(photo()))
    finally:
        graph.write_bytes(original)


def test_it_runs_on_the_cpu_alone() -> None:
    with pytest.raises(OptionError, match="runs on the CPU"):
        ImageVectorizer(model=tiny, weights="random", engine="openvino", device="cuda")


def test_without_openvino_one_warning_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan._warn_once_that_it_is_missing.cache_clear()
    monkeypatch.setattr("imagevec.engines.openvino.is_available", lambda: False)
    for layer in ("pooled", "logits"):
        assert make_plan(model=tiny, weights="random", layer=layer).backend == "torch"
    assert len([r.message for r in caplog.records if "imagevec[openvino]" in r.message]) == 1


def test_without_openvino_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not openvino.is_available()
    with pytest.raises(MissingExtraError, match=r"imagevec\[openvino\]"):
        ImageVectorizer(model=Tiny, weights="random", engine="openvino")


def test_a_forward_pass_without_memory_is_never_wrong() -> None:
    """OpenVINO itself raises nothing, and leaves the vectors of the batch before.

    It may end the process instead. Spark then runs the task again.
    """
    code = """
import re, resource
from pathlib import Path
import numpy as np
from tests.helpers.pipeline import engine_of

engine = engine_of(model="squeezenet1_1", weights="random", engine="openvino")
few, many, others = (np.full((n, 224, 224, 3), n, np.uint8) for n in (9, 64, 8))
right = engine(others).copy()
engine(few)
used = re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
resource.setrlimit(resource.RLIMIT_AS, (int(used) * 1024, resource.RLIM_INFINITY))
for images in (many, others):
    try:
        vectors = engine(images)
    except Exception:  # MemoryError, or what the library raises where it does
        print("error", flush=True)
    else:
        is_right = images is others and np.array_equal(vectors, right)
        print("right" if is_right else "wrong", flush=True)
"""
    command = [sys.executable, "-c", "print('start', flush=True)\n" + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    printed = done.stdout.split()
    whole = (["start", "error", "error"], ["start", "error", "right"])
    is_dead = done.returncode < 0 and printed in (["start"], ["start", "error"])
    assert is_dead or printed in whole, done.stderr
