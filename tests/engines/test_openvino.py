"""The OpenVINO engine; it skips where the extra is not installed."""

from __future__ import annotations

import pytest

from imagevec import ImageVectorizer, OptionError, WeightsError
from imagevec.plan import resolve
from tests.helpers.factories import tiny
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
    recipe, paths, _ = resolve(model=tiny, weights="random")
    assert recipe.engine == "openvino"
    assert recipe.entry is None
    assert [path.suffix for path in paths] == [".xml", ".bin"]


def test_a_graph_that_was_altered_is_refused() -> None:
    vectorizer = ImageVectorizer(model=tiny, weights="random", normalize=True)
    graph = next(path for path in vectorizer._paths if path.suffix == ".xml")
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


def test_a_conversion_is_kept_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model": tiny, "weights": "random", "layer": "logits"}
    first = resolve(**options)
    monkeypatch.setattr("imagevec.plan.convert", None)
    assert resolve(**options) == first


def test_without_openvino_one_warning_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from imagevec import plan as recipe

    recipe._warn_once_that_openvino_is_missing.cache_clear()
    monkeypatch.setattr("imagevec.engines.openvino.is_installed", lambda: False)
    for _ in range(2):
        assert resolve(model=tiny, weights="random")[0].engine == "torch"
    assert [r.message for r in caplog.records if "imagevec[openvino]" in r.message] != []
    assert len(caplog.records) == 1
