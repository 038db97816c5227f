"""Steps of the pipeline that several tests use."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from imagevec import FeatureSpec, ImageVectorizer, Preprocessing, cache
from imagevec.engines import Engine, Inputs
from imagevec.engines.torch_engine import normalize
from imagevec.images.decode import DecodedImage, Pixels, decode
from imagevec.images.preprocess import resize_and_crop
from imagevec.options import DEFAULTS
from imagevec.plan import Plan, make_plan
from imagevec.runtime import get_engine
from imagevec.spec import ExecutionOptions
from imagevec.stream import Schedule, feature_stream

Batch = pd.Series | pd.DataFrame

# The environment of a process in which OpenVINO and oneDNN do not use bfloat16 instructions.
WITHOUT_BFLOAT16 = {
    "OV_CPU_MAX_ISA": "AVX512_CORE_VNNI",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
}


def decoded(data: bytes, **options: Any) -> DecodedImage:
    """Runs ``decode`` with the default limits."""
    limits = {name: DEFAULTS[name] for name in ("max_pixels", "formats")}
    return decode(data, **{**limits, **options})


def pixels_of(image: Image.Image) -> Pixels:
    """Converts an RGB image to uint8 ``(H, W, 3)``."""
    return np.array(image)


def preprocess(pixels: Pixels, preprocessing: Preprocessing) -> torch.Tensor:
    """Converts uint8 ``(H, W, 3)`` to the model's input: float32 ``(3, S, S)``."""
    cropped = torch.from_numpy(resize_and_crop(pixels, preprocessing).copy())
    return normalize(cropped.permute(2, 0, 1)[None], preprocessing)[0]


def execution_options(**options: Any) -> ExecutionOptions:
    return ExecutionOptions.of({**DEFAULTS, **options})


def plan_and_engine(**options: Any) -> tuple[Plan, Engine]:
    """Makes a plan and its engine on the CPU. ``engine`` is PyTorch by default."""
    plan = make_plan(**{"engine": "torch", **options})
    return plan, get_engine(plan, cache.stored, "cpu", threads=1)


def engine_of(**options: Any) -> Engine:
    _, engine = plan_and_engine(**options)
    return engine


def vector_of(image: bytes, **options: Any) -> Any:
    """Runs ``ImageVectorizer.extract_features``. ``engine`` is PyTorch by default."""
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
    num_features: int = 3,
    **options: Any,
) -> list[Batch]:
    """Passes Arrow batches through ``feature_stream``, as an iterator, as in Spark."""
    return list(
        feature_stream(
            iter(batches),
            engine,
            spec_of(preprocessing or Preprocessing(), layer_sizes, num_features),
            execution_options(**options),
            Schedule(batch_size, decode_threads=decode_threads, overlap=overlap),
        )
    )


def rows(batches: Iterable[Batch]) -> list[Any]:
    """Returns the vectors and nulls of all batches, or dictionaries of struct fields."""
    return [
        row
        for batch in batches
        for row in (batch if isinstance(batch, pd.Series) else batch.to_dict("records"))
    ]


def small_row(value: object, **options: Any) -> dict[str, Any]:
    """Processes one value into struct fields; the vector is the mean of each channel."""

    (row,) = rows(stream([series([value])], mean_engine, output="struct", **options))
    return row


def mean_engine(images: Inputs) -> np.ndarray:
    """Computes the mean of each channel: uint8 ``(N, S, S, 3)`` to float32 ``(N, 3)``."""
    return images.mean((1, 2), dtype=np.float32)


def spec_of(
    preprocessing: Preprocessing,
    layer_sizes: dict[str, int] | None = None,
    num_features: int = 3,
) -> FeatureSpec:
    """Returns the spec of an arbitrary model, with several layers or ``num_features``."""
    layer = tuple(layer_sizes) if layer_sizes else ""
    sizes = tuple(layer_sizes.values()) if layer_sizes else num_features
    return FeatureSpec("any", "random", layer, sizes, preprocessing, "float32", False)


def series(values: Iterable[object]) -> pd.Series:
    return pd.Series(list(values), dtype=object)


def saved(factory: Callable[[], nn.Module], path: Path, seed: int = 1) -> nn.Module:
    """Builds a seeded model in evaluation mode, and saves its weights to the file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory().eval()
    torch.save(model.state_dict(), path)
    return model


def run_python(code: str, **environment: str) -> str:
    """Runs code in a new Python process and returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class _Writes:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


class _Mean(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def write_code(path: Path, marker: Path) -> None:
    """Writes a ``.pt2`` file that creates ``marker`` when it is loaded, and checks that it does."""
    batch = torch.export.Dim("batch")
    shapes = ({0: batch},)
    program = torch.export.export(_Mean().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=shapes)
    harmless, code = io.BytesIO(), io.BytesIO()
    torch.export.save(program, harmless)
    torch.save(_Writes(marker), code)
    with zipfile.ZipFile(harmless) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            is_inputs = "sample_inputs" in name or "example_inputs" in name
            target.writestr(name, code.getvalue() if is_inputs else source.read(name))
    with contextlib.suppress(Exception):
        torch.export.load(path)
    marker.unlink()
