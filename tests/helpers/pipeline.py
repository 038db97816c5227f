"""Steps of the pipeline that more than one test takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from imagevec import ImageVectorizer
from imagevec.engines import Engine
from imagevec.images.decode import DecodedImage, decode
from imagevec.plan import Recipe, resolve
from imagevec.runtime import get_engine
from imagevec.spec import DEFAULTS, ExecutionOptions, Preprocessing
from imagevec.stream import feature_stream

Batch = pd.Series | pd.DataFrame


def decoded(data: bytes, **options: Any) -> DecodedImage:
    """``decode`` with the default limits."""
    limits = {name: DEFAULTS[name] for name in ("max_pixels", "formats")}
    return decode(data, **{**limits, **options})


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 ``(3, H, W)`` of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def execution_options(**options: Any) -> ExecutionOptions:
    return ExecutionOptions.of({**DEFAULTS, **options})


def recipe_of(**options: Any) -> Recipe:
    recipe, *_ = resolve(**options)
    return recipe


def recipe_and_engine(**options: Any) -> tuple[Recipe, Engine]:
    """A recipe, and this process's engine for it on the CPU; by PyTorch, if not said otherwise."""
    recipe, paths, _ = resolve(**{"engine": "torch", **options})
    by_name = {path.name: path for path in paths}
    return recipe, get_engine(recipe, by_name.__getitem__, torch.device("cpu"), threads=1)


def engine_of(**options: Any) -> Engine:
    _, engine = recipe_and_engine(**options)
    return engine


def vector_of(image: bytes, **options: Any) -> Any:
    """``ImageVectorizer.extract_features``, by PyTorch unless ``engine`` says otherwise."""
    vector = ImageVectorizer(**{"engine": "torch", **options}).extract_features(image)
    assert vector is not None
    return vector


def stream(
    batches: Iterable[Batch],
    engine: Engine,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 4,
    decode_threads: int = 1,
    overlap: bool = False,
    layer_sizes: dict[str, int] | None = None,
    **options: Any,
) -> list[Batch]:
    """The Arrow batches that ``feature_stream`` makes of some, an iterator of them as in Spark."""
    return list(
        feature_stream(
            iter(batches),
            engine,
            preprocessing or Preprocessing(),
            execution_options(**options),
            batch_size,
            decode_threads,
            overlap,
            layer_sizes=layer_sizes,
        )
    )


def rows(batches: Iterable[Batch]) -> list[Any]:
    """Vectors and nulls of all batches, or dictionaries of a struct's fields."""
    return [
        row
        for batch in batches
        for row in (batch if isinstance(batch, pd.Series) else batch.to_dict("records"))
    ]


def small_row(value: object, **options: Any) -> dict[str, Any]:
    """What becomes of one value, as a struct's fields; the vector is the mean of each channel."""

    def engine(images: torch.Tensor) -> np.ndarray:
        return images.float().mean((2, 3)).numpy()

    (row,) = rows(stream([series([value])], engine, output="struct", **options))
    return row


def series(values: Iterable[object]) -> pd.Series:
    return pd.Series(list(values), dtype=object)


def saved(factory: Callable[[], nn.Module], path: Path, seed: int = 1) -> nn.Module:
    """A seeded model in evaluation mode, whose weights are in the file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory().eval()
    torch.save(model.state_dict(), path)
    return model


def run_python(code: str, **environment: str) -> str:
    """What a new Python process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
