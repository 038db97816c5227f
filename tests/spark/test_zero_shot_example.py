from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from imagevec import ImageVectorizer, text_features
from tests.helpers.examples import run_example
from tests.helpers.images import encode, photo

MODEL = "open_clip/ViT-S-32-alt"  # the smallest that open_clip has


def test_each_photo_has_the_label_that_is_nearest(
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("open_clip")
    images = {f"{seed}.jpg": encode(photo(64, 48, seed), "JPEG") for seed in range(3)}
    for name, image in images.items():
        (tmp_path / name).write_bytes(image)
    labels = ["shoe", "dress", "hat"]
    options = ["--model", MODEL, "--weights", "random"]
    run_example(monkeypatch, spark, "zero_shot", str(tmp_path), *labels, *options)
    printed = capsys.readouterr().out
    told = {name: label for _, label, name in map(str.split, printed.splitlines())}

    prompts = [f"a photo of a {label}" for label in labels]
    texts = text_features(prompts, model=MODEL, weights="random", normalize=True)
    vectorizer: Any = ImageVectorizer(model=MODEL, weights="random", normalize=True)
    nearest = {
        name: labels[int(np.argmax(texts @ vectorizer.extract_features(image)))]
        for name, image in images.items()
    }
    assert told == nearest
