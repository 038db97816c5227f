from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagevec import ImageVectorizer, text_features
from tests.helpers.images import encode, photo
from tests.helpers.shared import ROOT

MODEL = "open_clip/ViT-S-32-alt"  # the smallest that open_clip has


@pytest.mark.java
def test_each_photo_has_the_label_that_is_nearest(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    images = {f"{seed}.jpg": encode(photo(64, 48, seed), "JPEG") for seed in range(3)}
    for name, image in images.items():
        (tmp_path / name).write_bytes(image)
    labels = ["shoe", "dress", "hat"]
    example = str(ROOT / "examples" / "zero_shot.py")
    options = ["--model", MODEL, "--weights", "random"]
    done = subprocess.run(
        [sys.executable, example, str(tmp_path), *labels, *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = {name: label for _, label, name in map(str.split, done.stdout.splitlines())}

    prompts = [f"a photo of a {label}" for label in labels]
    texts = text_features(prompts, model=MODEL, weights="random", normalize=True)
    vectorizer: Any = ImageVectorizer(model=MODEL, weights="random", normalize=True)
    nearest = {
        name: labels[int(np.argmax(texts @ vectorizer.extract_features(image)))]
        for name, image in images.items()
    }
    assert told == nearest
