"""The table of what is measured: approaches, and the stages that compare some of them."""

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
    """One way to compute the vectors.

    Attributes:
        name: What the tables call it.
        make: A torchvision model's name to a UDF of a binary column, with random weights.
        precision: Of its forward pass: which ceiling it is compared to.
        lowest_cosine: What its vectors must reach against the baseline's.
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
    """A saved model, quantized from random weights on the small images; made once."""
    folder = CACHE / "int8" / model
    if not folder.exists():
        images = [str(path) for path in generated("small").paths]
        # What its vectors are worth is for real weights to tell: benchmarks/fidelity.py.
        quantize(images, output=folder, model=model, weights="random", min_median_cosine=0)
    return folder


def model_of(name: str, precision: str) -> str:
    """What a ``ceiling.Engine`` takes: a torchvision model's name, or an int8 graph's file."""
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
    """Approaches that are compared: the same images and model, interleaved in rounds.

    Attributes:
        model: A name of ``torchvision.models``.
        image_set: A name of ``images.RECIPES``, or ``"folder"``.
        approaches: Names; the baseline is always among them.
        ceilings: Engine and precision of the forward passes that are measured beside them.
        one_worker: The approaches that are measured with one worker too.
        images: How many images of the set; all of them where ``None``.
        seconds: What one timed run should last.
        rounds: How often each is timed.
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
        seconds=10,  # a job's fixed 0.3 s is then 3 % of it
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
    # Not int8: its calibration alone would take a minute.
    Stage("mobilenet_v3_large", "small", (BASELINE, *_OURS[:2]), _OPENVINO[:2]),
    # No ceilings either: their conversion alone would take minutes.
    Stage("vit_b_16", "small", (BASELINE, *_OURS[:2]), images=16),
)

# Approach, model, image set, images.
MEMORY = (
    (BASELINE, "resnet50", "small", 200),
    ("features_udf, float32, engine torch", "resnet50", "small", 500),
    ("features_udf, float32", "resnet50", "small", 2000),
    ("features_udf, bfloat16", "resnet50", "small", 2000),
)
