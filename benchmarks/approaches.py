"""The approaches that are measured, and the stages that compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baselines import broadcast_udf, guide_pandas_udf, predict_batch, rowwise_udf
from benchmarks.images import CACHE, generated
from benchmarks.results import BASELINE
from imagevec import make_features_udf, quantize


@dataclass(frozen=True)
class Approach:
    """A way to compute the vectors.

    Attributes:
        name: Its name in the tables.
        make: Function from the name of a torchvision model to a UDF on a binary column, with
            random weights.
        precision: Precision of the forward pass. Selects the ceiling for the comparison.
        lowest_cosine: Required minimum cosine to the baseline's vectors.
    """

    name: str
    make: Callable[[str], Any]
    precision: str = "float32"
    lowest_cosine: float = 0.9999


def _ours(name: str, lowest_cosine: float = 0.9999, **options: Any) -> Approach:
    def make(model: str) -> Any:
        return make_features_udf(model=model, weights="random", **options)

    return Approach(name, make, options.get("precision", "float32"), lowest_cosine)


def int8_model(model: str) -> Path:
    """Returns a saved model with random weights, quantized on the small images and cached."""
    folder = CACHE / "int8" / model
    if not folder.exists():
        images = [str(path) for path in generated("small").paths]
        # Random weights say nothing about fidelity; benchmarks/fidelity.py uses real ones.
        quantize(images, output=folder, model=model, weights="random", min_median_cosine=0)
    return folder


def model_of(name: str, precision: str) -> str:
    """Returns the model of a ``ceiling.Engine``: a torchvision name, or an int8 graph's file."""
    return str(int8_model(name) / "model.xml") if precision == "int8" else name


APPROACHES = (
    Approach(BASELINE, broadcast_udf),
    Approach("plain row-wise UDF", rowwise_udf),
    Approach("pandas UDF from the guides", guide_pandas_udf),
    Approach("predict_batch_udf", predict_batch),
    _ours("features_udf, float32, engine torch", engine="torch"),
    _ours("features_udf, float32"),
    _ours("features_udf, bfloat16", precision="bfloat16", lowest_cosine=0.99),
    Approach(
        "features_udf, int8",
        lambda model: make_features_udf(model=str(int8_model(model))),
        precision="int8",
        lowest_cosine=0.95,
    ),
    _ours(
        "features_udf, bfloat16, scaled decode",
        precision="bfloat16",
        decode="scaled",
        lowest_cosine=0.99,
    ),
    Approach(
        "features_udf, int8, scaled decode",
        lambda model: make_features_udf(model=str(int8_model(model)), decode="scaled"),
        precision="int8",
        lowest_cosine=0.95,
    ),
)


def find(name: str) -> Approach:
    (approach,) = [approach for approach in APPROACHES if approach.name == name]
    return approach


@dataclass(frozen=True)
class Stage:
    """Approaches that are compared on the same images and model, interleaved in rounds.

    Attributes:
        model: Name in ``torchvision.models``.
        image_set: Name in ``images.RECIPES``, or ``"folder"``.
        approaches: Their names, including the baseline.
        ceilings: Engine and precision of each forward pass that is measured as a ceiling.
        one_worker: Approaches that are also measured with one worker.
        images: Number of images from the set, or ``None`` for all of them.
        seconds: Target duration of a timed run.
        rounds: Number of timed runs of each approach.
    """

    model: str
    image_set: str
    approaches: tuple[str, ...]
    ceilings: tuple[tuple[str, str], ...] = ()
    one_worker: tuple[str, ...] = ()
    images: int | None = None
    seconds: float = 4
    rounds: int = 2

    @property
    def name(self) -> str:
        return f"{self.model}, {self.image_set}"


_OURS = ("features_udf, float32", "features_udf, bfloat16", "features_udf, int8")
_OPENVINO = (("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8"))

STAGES = (
    Stage(
        "resnet50",
        "small",
        approaches=tuple(approach.name for approach in APPROACHES if "scaled" not in approach.name),
        ceilings=_OPENVINO,
        one_worker=_OURS[:2],
        seconds=10,  # keeps the fixed 0.3 s of a job at 3 %
        rounds=3,
    ),
    Stage("resnet50", "web", (BASELINE, *_OURS[:2])),
    Stage(
        "resnet50",
        "camera",
        (
            BASELINE,
            *_OURS[:2],
            "features_udf, bfloat16, scaled decode",
            "features_udf, int8, scaled decode",
        ),
        seconds=7,
    ),
    # No int8: calibration would take a minute.
    Stage("mobilenet_v3_large", "small", (BASELINE, *_OURS[:2]), _OPENVINO[:2]),
    # No ceilings either: conversion would take minutes.
    Stage("vit_b_16", "small", (BASELINE, *_OURS[:2]), images=16),
)

# Approach, model, image set, images.
MEMORY = (
    (BASELINE, "resnet50", "small", 200),
    ("features_udf, float32, engine torch", "resnet50", "small", 500),
    ("features_udf, float32", "resnet50", "small", 2000),
    ("features_udf, bfloat16", "resnet50", "small", 2000),
)
