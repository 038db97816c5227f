from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from pyspark.sql import SparkSession

from tests.helpers.examples import run_example
from tests.helpers.images import encode, photo


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


def test_it_tells_colours_apart(
    spark: SparkSession,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [str(folder), "--model", "squeezenet1_1", "--weights", "random"]
    run_example(monkeypatch, spark, "classify", *options)
    assert capsys.readouterr().out.splitlines() == [
        "train: 12 photos, 2 classes",
        "test: 6 photos",
        "accuracy: 1.000",
        "same predictions after loading in a new process: True",
    ]
