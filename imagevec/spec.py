"""What a feature vector is (``FeatureSpec``) and how it is computed (``ExecutionOptions``).

The first fixes the numbers, the second may only change speed, limits and the form of the result.
Both are frozen, validated when made, and small: they are what travels to Spark's workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from imagevec.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
ENGINES = ("auto", "torch", "openvino")


class Options(TypedDict, total=False):
    """The keyword options of ``features_udf``, ``make_features_udf`` and ``ImageVectorizer``."""

    model: str | Callable[[], nn.Module]
    """A name of ``list_models()``, ``"timm/<name>"``, a zero-argument factory of an ``nn.Module``,
    the path of a saved model, or of a ``.pt2`` file, whose loading can run code that is in it: see
    ``imagevec.models.exported``. Default ``"resnet50"``."""
    weights: str
    """A torchvision weights name, a path to ``.pth``, ``.pt`` or ``.safetensors``, or
    ``"random"`` (seeded: the same on every worker). Default ``"DEFAULT"``."""
    layer: str | Sequence[str]
    """``"pooled"`` (the input of the classifier's last linear layer), ``"logits"``, or a node of
    ``torchvision.models.feature_extraction.get_graph_node_names``. Several, all of one forward
    pass, give a struct with a vector a layer. Default ``"pooled"``."""
    normalize: bool
    """L2-normalise each vector. Default ``False``."""
    precision: Literal["float32", "bfloat16", "float16", "int8", "auto"]
    """``"float16"`` needs CUDA; ``"int8"`` is a saved model's, of ``quantize``; ``"auto"`` is
    bfloat16 where the driver's CPU or GPU has it, else float32. Default ``"float32"``."""
    engine: Literal["auto", "torch", "openvino"]
    """What runs the forward pass. Default ``"auto"``: PyTorch on CUDA, and on the CPU OpenVINO if
    it is installed."""
    device: str
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. Default ``"auto"``: the GPU that Spark
    assigned to the task, else any GPU, else the CPU."""
    batch_size: int | Literal["auto"]
    """Images in one forward pass. Default ``"auto"``."""
    max_pixels: int
    """A larger image is an error row, by its header. Default 89,478,485, which is Pillow's."""
    formats: Sequence[str]
    """The formats that are decoded; all others are error rows. Default ``FORMATS``."""
    allowed_roots: Sequence[str]
    """Where paths in the input column may lead: absolute folders and prefixes of URIs, such as
    ``"s3://bucket/photos"`` or ``"s3://"``. Default ``()``: anywhere that the worker can read."""
    decode: Literal["exact", "scaled"]
    """``"scaled"`` decodes JPEGs at the smallest scale that keeps twice ``resize_size``, which is
    faster for large ones. Default ``"exact"``."""
    on_error: Literal["null", "raise"]
    """A bad image gives a null, or fails the query with its reason. Default ``"null"``."""
    isolate: bool
    """Decode in a child process, so that an image that crashes or hangs its decoder is an error
    row too. It costs some 300 MB a worker and seconds at its start. Default ``False``."""
    output: Literal["array", "struct"]
    """``array<float>``, or ``struct<features: array<float>, error: string, width: int,
    height: int>``. With several layers, ``struct<<layer>: array<float>, ...>`` takes the place of
    ``array<float>``; it is never null itself, since no pandas UDF can return a null struct: where
    there is no image, each of its fields is. Default ``"array"``."""


DEFAULTS: Options = {
    "model": "resnet50",
    "weights": "DEFAULT",
    "layer": "pooled",
    "normalize": False,
    "precision": "float32",
    "engine": "auto",
    "device": "auto",
    "batch_size": "auto",
    "max_pixels": 89_478_485,
    "formats": FORMATS,
    "allowed_roots": (),
    "decode": "exact",
    "on_error": "null",
    "isolate": False,
    "output": "array",
}


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``OptionError`` with the nearest choices if ``value`` is none of them."""
    if value not in choices:
        raise OptionError(f"{option}={value!r} is not known: {did_you_mean(value, choices)}")


def check_positive(option: str, value: object) -> None:
    """Raises ``OptionError`` unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{option}={value!r} is not valid: use an integer of at least 1")


def _check_bool(option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{option}={value!r} is not valid: use True or False")


def check_layer(layer: Any) -> Any:
    """A ``layer`` option: one name as it is, several as a tuple.

    Raises:
        OptionError: There are none, or one is there twice. Names are the model's to know.
    """
    if not isinstance(layer, list | tuple):
        return layer
    if not layer or not all(isinstance(name, str) for name in layer):
        raise OptionError(
            f"layer={layer!r} is not valid: give names, ('layer3', 'pooled') for example"
        )
    for name in layer:
        if layer.count(name) > 1:
            raise OptionError(f"layer={layer!r} is not valid: give {name!r} once")
    return tuple(layer)


@dataclass(frozen=True)
class Preprocessing:
    """A file to float32 ``(3, crop_size, crop_size)``: decode, resize, centre crop, normalise.

    The defaults are the ones of torchvision's ``ImageClassification`` preset.

    Attributes:
        resize_size: Pixels of the shorter side after the resize, at least ``crop_size``.
        crop_size: Pixels of each side of the centre crop: the model's ``input_size``.
        mean: Of each RGB channel, on the 0 to 1 scale.
        std: Of each RGB channel, on the 0 to 1 scale.
        interpolation: ``"bilinear"`` or ``"bicubic"``, both antialiased.
        squash: Resize to a square of ``resize_size`` instead, whatever the aspect ratio.
        decode: ``"exact"``, or ``"scaled"``: JPEGs are decoded at the smallest scale of 1/1, 1/2,
            1/4 and 1/8 that keeps ``min_decoded_side`` pixels of both sides.
    """

    resize_size: int = 256
    crop_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    squash: bool = False
    decode: Literal["exact", "scaled"] = "exact"

    @property
    def min_decoded_side(self) -> int | None:
        """Twice the resize target: the lowest cosines to the exact path that
        ``benchmarks/fidelity.py`` found are 0.9991 (SqueezeNet) and 0.9986 (EfficientNet-Lite0).
        """
        return 2 * self.resize_size if self.decode == "scaled" else None

    def __post_init__(self) -> None:
        check_choice("decode", self.decode, ("exact", "scaled"))
        check_choice("interpolation", self.interpolation, ("bilinear", "bicubic"))
        check_positive("crop_size", self.crop_size)
        check_positive("resize_size", self.resize_size)
        if self.resize_size < self.crop_size:
            raise OptionError(
                f"resize_size={self.resize_size} is not valid: "
                f"use at least crop_size={self.crop_size}"
            )
        for option in ("mean", "std"):
            value = getattr(self, option)
            if not isinstance(value, tuple) or len(value) != 3:
                raise OptionError(f"{option} is not valid: give one number a channel, R, G and B")


@dataclass(frozen=True)
class FeatureSpec:
    """All that fixes the numbers of a feature vector.

    Attributes:
        model: The model's name; a factory's is ``factory:<module>.<qualname>``, a ``.pt2`` file's
            ``pt2:<name without suffix>``.
        weights: ``sha256:<hex digest of the weights file>`` (the ``.pt2`` file), or ``random``.
        layer: ``"pooled"``, ``"logits"`` or a node name; several as a tuple.
        num_features: The length of a vector; of each layer's, in order, if there are several.
        preprocessing: What happens to the pixels before the model.
        precision: The arithmetic of the forward pass.
        normalize: Whether each vector has length 1.
    """

    model: str
    weights: str
    layer: str | tuple[str, ...]
    num_features: int | tuple[int, ...]
    preprocessing: Preprocessing
    precision: str
    normalize: bool

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        _check_bool("normalize", self.normalize)
        sizes = self.num_features
        for size in sizes if isinstance(sizes, tuple) else (sizes,):
            check_positive("num_features", size)

    @property
    def layer_sizes(self) -> dict[str, int] | None:
        """The length of each layer's vector, in order; ``None`` for one layer alone."""
        if isinstance(self.num_features, int):
            return None
        return dict(zip(self.layer, self.num_features, strict=True))

    def to_json(self) -> str:
        """The spec as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """The inverse of ``to_json``."""
        fields: dict[str, Any] = json.loads(text)
        pre: dict[str, Any] = fields.pop("preprocessing")
        pre["mean"], pre["std"] = tuple(pre["mean"]), tuple(pre["std"])
        for name in ("layer", "num_features"):
            if isinstance(fields[name], list):
                fields[name] = tuple(fields[name])
        return cls(preprocessing=Preprocessing(**pre), **fields)

    @property
    def fingerprint(self) -> str:
        """16 hex digits: equal for two specs if and only if their vectors are comparable."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ExecutionOptions:
    """How vectors are computed and handed back. ``Options`` says what each one means."""

    engine: str
    device: str
    batch_size: int | Literal["auto"]
    max_pixels: int
    formats: tuple[str, ...]
    allowed_roots: tuple[str, ...]
    on_error: str
    isolate: bool
    output: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ExecutionOptions:
        """The part of all options that is not ``FeatureSpec``'s."""
        formats, roots = options["formats"], options["allowed_roots"]
        return cls(
            engine=options["engine"],
            device=options["device"],
            batch_size=options["batch_size"],
            max_pixels=options["max_pixels"],
            formats=(formats,) if isinstance(formats, str) else tuple(formats or ()),
            allowed_roots=(roots,) if isinstance(roots, str) else tuple(roots or ()),
            on_error=options["on_error"],
            isolate=options["isolate"],
            output=options["output"],
        )

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        kind, _, index = str(self.device).partition(":")
        if not (self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal())):
            choices = ("auto", "cpu", "cuda", "cuda:0")
            raise OptionError(
                f"device={self.device!r} is not known: {did_you_mean(self.device, choices)}"
            )
        if self.batch_size != "auto":
            check_positive("batch_size", self.batch_size)
        check_positive("max_pixels", self.max_pixels)
        if not self.formats:
            raise OptionError(f"formats is empty: choose from {', '.join(FORMATS)}")
        for name in self.formats:
            check_choice("formats", name, FORMATS)
        for root in self.allowed_roots:
            if not root.startswith("/") and ":" not in root:
                raise OptionError(f"allowed_roots={root!r} is not valid: use an absolute path")
        check_choice("on_error", self.on_error, ("null", "raise"))
        _check_bool("isolate", self.isolate)
        check_choice("output", self.output, ("array", "struct"))
