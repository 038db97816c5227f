"""Real photos, real weights, and files made to break decoders: wider checks, where they are there.

The accuracies are printed: ``pytest -s tests/spark/test_shared_data.py``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

from imagevec import features_udf
from imagevec.errors import IMAGE_ERROR_CODES
from imagevec.options import FORMATS
from tests.helpers.images import cosine
from tests.helpers.shared import CLOTHING, HOSTILE, SQUEEZENET_WEIGHTS, needs_shared

pytestmark = needs_shared

REAL: dict[str, Any] = {"model": "squeezenet1_1", "weights": str(SQUEEZENET_WEIGHTS)}
NEIGHBOURS = 5


def photos(split: str) -> tuple[list[bytes], np.ndarray]:
    """The photos of ``"gallery"`` or ``"query"``, and their classes."""
    paths = sorted((CLOTHING / split).glob("*/*.jpg"))
    return [path.read_bytes() for path in paths], np.array([path.parent.name for path in paths])


def features(frame, images: list[bytes], **options) -> np.ndarray:
    """``(N, D)``, in the order of the images."""
    df = frame(images, partitions=4).select("id", features_udf("content", **options).alias("f"))
    rows = df.collect()
    assert [row.id for row in rows] == list(range(len(images)))
    return np.array([row.f for row in rows])


@pytest.fixture(scope="module")
def by_torchvision() -> np.ndarray:
    """The queries by torchvision's model and preset, on images that Pillow decodes."""
    model = squeezenet1_1()
    model.load_state_dict(torch.load(SQUEEZENET_WEIGHTS, weights_only=True))
    preset = SqueezeNet1_1_Weights.DEFAULT.transforms()
    vectors = []
    with torch.inference_mode():
        for data in photos("query")[0]:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            vectors.append(model.eval().features(preset(image)[None]).mean((2, 3))[0].numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module")
def first_features() -> dict[str, np.ndarray]:
    """What an engine gave the first time."""
    return {}


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("arrow_rows", [1, 7, 10_000], indirect=True)
def test_query_photos_are_as_by_torchvision(
    frame, by_torchvision, first_features, engine, arrow_rows
):
    images, _ = photos("query")
    ours = features(frame, images, engine=engine, **REAL)
    assert ours.shape == by_torchvision.shape == (80, 512)
    assert cosine(ours, by_torchvision).min() >= 0.9999
    first = first_features.setdefault(engine, ours)
    np.testing.assert_allclose(ours, first, atol=1e-4 * np.abs(first).max())


def accuracy(frame, **options) -> float:
    """Of the majority class of the 5 gallery photos that are nearest to each query, by cosine."""
    (gallery, classes), (queries, expected) = photos("gallery"), photos("query")
    vectors = features(frame, [*gallery, *queries], normalize=True, **options)
    similarities = vectors[len(gallery) :] @ vectors[: len(gallery)].T
    nearest = np.argsort(-similarities, axis=1)[:, :NEIGHBOURS]
    voted = [max(votes, key=votes.count) for votes in classes[nearest].tolist()]
    return float(np.mean(np.array(voted) == expected))


def test_real_weights_find_clothes_of_the_same_kind(frame):
    real = accuracy(frame, **REAL)
    random = accuracy(frame, model="squeezenet1_1", weights="random")
    print(f"\ncosine {NEIGHBOURS}-NN accuracy: random weights {random:.3f}, real {real:.3f}")
    assert real >= 0.55
    assert real - random >= 0.25


def pillow_reads(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_hostile_file_becomes_a_row(spark):
    paths = sorted(path for path in HOSTILE.rglob("*") if path.is_file())
    files = spark.read.format("binaryFile").option("recursiveFileLookup", True).load(str(HOSTILE))
    df = files.select("path", features_udf("content", output="struct", **REAL).alias("result"))
    rows = df.collect()
    results = {Path(row.path.removeprefix("file:")).resolve(): row.result for row in rows}
    assert sorted(results) == sorted(path.resolve() for path in paths)
    assert len(rows) == len(paths)
    for path, result in results.items():
        assert (result.features is None) == (result.error is not None), path
        assert (result.features is not None) == pillow_reads(path), (path, result.error)
        assert result.error is None or result.error.partition(":")[0] in IMAGE_ERROR_CODES
        assert result.features is None or len(result.features) == 512
    codes = {result.error.partition(":")[0] for result in results.values() if result.error}
    assert {"unsupported_format", "corrupt"} <= codes
    assert sum(result.error is None for result in results.values()) > 150
