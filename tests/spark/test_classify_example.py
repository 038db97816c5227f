from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.images import encode, photo
from tests.helpers.shared import ROOT


def classify(folder: Path, *options: str) -> str:
    """What the example prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "classify.py"), str(folder), *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red and blue photos, in a folder with a space in its name."""
    for part, seeds in (("gallery", range(6)), ("query", range(6, 9))):
        for colour in ("red", "blue"):
            place = tmp_path / "some photos" / part / colour
            place.mkdir(parents=True)
            for seed in seeds:
                image = photo(64, 48, seed)
                image = Image.blend(image, Image.new("RGB", image.size, colour), 0.5)
                (place / f"{seed}.jpg").write_bytes(encode(image, "JPEG"))
    return tmp_path / "some photos"


@pytest.mark.java
def test_it_tells_colours_apart(folder: Path) -> None:
    assert classify(folder, "--model", "squeezenet1_1", "--weights", "random").splitlines() == [
        "train: 12 photos, 2 classes",
        "test: 6 photos",
        "accuracy: 1.000",
        "same predictions after loading in a new process: True",
    ]
