from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import numpy as np
import pytest

from imagevec import ImageError, ImageVectorizer, OptionError
from tests.helpers.factories import tiny
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import run_python, vector_of

JPEG = encode(photo(), "JPEG")
TINY: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}


@pytest.fixture(scope="module")
def vectorizer() -> ImageVectorizer:
    return ImageVectorizer(**TINY)


def test_resnet50_has_2048_features_and_needs_no_spark():
    printed = run_python(f"""
import sys
sys.modules["pyspark"] = None
from imagevec import ImageVectorizer
vectorizer = ImageVectorizer(model="resnet50", weights="random", engine="torch")
features = vectorizer.extract_features({JPEG!r})
print(type(features).__name__, {{type(number).__name__ for number in features}}, len(features))
""")
    assert printed.strip() == "list {'float'} 2048"


def test_num_features_is_the_length_of_a_vector(vectorizer):
    assert vectorizer.num_features == len(vectorizer.extract_features(JPEG)) == 8


def test_a_path_is_as_good_as_bytes(vectorizer, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "a.jpg"
    assert vectorizer.extract_features(str(path)) == vectorizer.extract_features(JPEG)
    assert vectorizer.extract_features(path.as_uri()) == vectorizer.extract_features(JPEG)


@pytest.mark.parametrize("image", [b"", b"garbage", JPEG[:200], "no/such/file.jpg"])
def test_a_bad_image_is_none_or_an_error(vectorizer, image):
    assert vectorizer.extract_features(image) is None
    with pytest.raises(ImageError):
        ImageVectorizer(**TINY, on_error="raise").extract_features(image)


def test_another_type_is_refused(vectorizer):
    with pytest.raises(OptionError, match="int values"):
        vectorizer.extract_features(7)


def test_the_output_option_is_of_data_frames_alone(vectorizer):
    struct = ImageVectorizer(**TINY, output="struct")
    assert struct.extract_features(JPEG) == vectorizer.extract_features(JPEG)


def test_limits_hold(vectorizer):
    small = ImageVectorizer(**TINY, max_pixels=100, on_error="raise")
    with pytest.raises(ImageError, match="too_large: 80x60"):
        small.extract_features(JPEG)


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_it_can_be_pickled(vectorizer, dumps):
    vector = vectorizer.extract_features(JPEG)  # an engine in use does not travel
    pickled = dumps(vectorizer)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).extract_features(JPEG) == vector


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_normalized_vectors_have_length_one(precision):
    options = {**TINY, "precision": precision}
    vector = vector_of(JPEG, **options)
    normalized = vector_of(JPEG, **options, normalize=True)
    assert np.linalg.norm(normalized) == pytest.approx(1, abs=1e-5)
    assert cosine(vector, normalized) >= 0.9999


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_each_of_several_layers_is_normalized(engine, precision):
    if engine == "openvino":
        pytest.importorskip("openvino")
    options = {"model": tiny, "weights": "random", "engine": engine, "precision": precision}
    vectorizer: Any = ImageVectorizer(**options, layer=("conv", "logits"), normalize=True)
    assert vectorizer.num_features == {"conv": 8, "logits": 5}
    for layer, vector in vectorizer.extract_features(JPEG).items():
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-2)
        exact = vector_of(JPEG, model=tiny, weights="random", layer=layer)
        assert cosine(vector, exact) >= 0.999


def test_several_layers_of_a_bad_image_are_none():
    vectorizer = ImageVectorizer(**TINY, layer=["conv", "pooled"])
    assert vectorizer.extract_features(b"garbage") is None


def test_a_scaled_decode_is_close_to_an_exact_one():
    large = encode(photo(2000, 1500), "JPEG", quality=90)
    options = {"model": "squeezenet1_1", "weights": "random"}
    exact = vector_of(large, **options)
    scaled = vector_of(large, **options, decode="scaled")
    assert scaled != exact
    assert cosine(scaled, exact) >= 0.999


def test_two_vectorizers_do_not_share_options(vectorizer):
    logits: Any = ImageVectorizer(**TINY, layer="logits")
    assert (len(logits.extract_features(JPEG)), len(vectorizer.extract_features(JPEG))) == (5, 8)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_several_threads_may_use_it(engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    images = [encode(photo(seed=seed)) for seed in range(20)]
    vectorizer: Any = ImageVectorizer(model="squeezenet1_1", weights="random", engine=engine)
    with ThreadPoolExecutor(4) as pool:
        in_threads = list(pool.map(vectorizer.extract_features, images))
    in_turn = [vectorizer.extract_features(image) for image in images]
    np.testing.assert_allclose(in_threads, in_turn, rtol=1e-4, atol=1e-6)
