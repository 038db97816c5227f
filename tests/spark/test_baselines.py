from __future__ import annotations

import functools

import numpy as np
import pytest
import torchvision

from imagevec import make_features_udf
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import saved

baselines = pytest.importorskip("benchmarks.baselines")

IMAGES = [encode(photo(300, 200, seed), "JPEG") for seed in range(5)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    saved(functools.partial(torchvision.models.get_model, "resnet18"), path)
    return str(path)


def features(frame, udf) -> np.ndarray:
    rows = frame(IMAGES).select("id", udf("content").alias("features")).collect()
    return np.array([row.features for row in sorted(rows)])


@pytest.fixture(scope="module")
def ours(frame, weights) -> np.ndarray:
    return features(frame, make_features_udf(model="resnet18", weights=weights))


@pytest.mark.parametrize(
    "baseline", ["rowwise_udf", "broadcast_udf", "guide_pandas_udf", "predict_batch"]
)
def test_a_baseline_gives_the_same_vectors(frame, weights, ours, baseline):
    udf = getattr(baselines, baseline)("resnet18", weights)
    theirs = features(frame, udf)
    assert theirs.shape == ours.shape == (5, 512)
    assert (cosine(theirs, ours) >= 0.9999).all()
    assert (cosine(theirs[1:], ours[:-1]) < 0.9999).all()
