"""``FeatureSpec`` defines a feature vector, ``ExecutionOptions`` how it is computed.

``FeatureSpec`` determines the numbers. ``ExecutionOptions`` only affects speed, limits and the form
of the result. Both are frozen, validated on creation, and small, because they are sent to Spark's
workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from imagevec._version import __version__
from imagevec.errors import OptionError
from imagevec.options import (
    DECODES,
    PRECISIONS,
    check_bool,
    check_choice,
    check_colour,
    check_positive,
    check_range,
    check_size,
    checked,
)

METADATA_KEY = "imagevec"


def own_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what imagevec wrote into a column's metadata, or into its comment; else empty."""
    if METADATA_KEY in metadata:
        return {METADATA_KEY: metadata[METADATA_KEY]}
    return metadata_of_json(metadata.get("comment"))


def metadata_of_json(text: str | None) -> dict[str, Any]:
    """Reads metadata from a comment or a table property; empty if imagevec did not write it."""
    try:
        read = json.loads(text or "")
    except ValueError:
        return {}
    return read if isinstance(read, dict) and METADATA_KEY in read else {}


@dataclass(frozen=True)
class Preprocessing:
    """The steps from a file to float32 ``(3, H, W)``, where H and W are those of ``crop_size``.

    They are: decode, resize, centre crop, normalise. The defaults match torchvision's
    ``ImageClassification`` preset.

    Attributes:
        resize_size: The size after the resize, in pixels, at least ``crop_size``. An integer is the
            length of the shorter side, as in torchvision. With ``(height, width)``, the image is
            the smallest of its aspect ratio that covers them, as in timm.
        crop_size: The size of the centre crop, in pixels: the side of a square, or
            ``(height, width)``. It is the size of the model's input.
        mean: The mean of each RGB channel, on a scale from 0 to 1.
        std: The standard deviation of each RGB channel, on a scale from 0 to 1.
        interpolation: ``"bilinear"`` or ``"bicubic"``, both antialiased.
        squash: Whether to resize to exactly ``resize_size``, ignoring the aspect ratio.
        crop_offset: How a crop offset of half a pixel is rounded: ``"round"`` to even as in
            torchvision, or ``"floor"`` as in Hugging Face's image processors.
        decode: ``"exact"``, or ``"scaled"`` to decode JPEGs at the smallest scale of 1/1, 1/2, 1/4
            and 1/8 that keeps ``min_decoded_side`` pixels on both sides.
        background: The colour behind transparent pixels, as ``"#rrggbb"``; ``None`` drops alpha.
        value_range: The values that become black and white in images of integers of more than 8
            bits and of floats; ``None`` takes the range that the file
            declares, or the full one of unsigned integers of 16 bits, and accepts no others.
    """

    resize_size: int | tuple[int, int] = 256
    crop_size: int | tuple[int, int] = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    squash: bool = False
    decode: Literal["exact", "scaled"] = "exact"
    crop_offset: Literal["round", "floor"] = "round"
    background: str | None = None
    value_range: tuple[float, float] | None = None

    @property
    def input_size(self) -> int | tuple[int, int]:
        """The size of the model's input, in pixels: the side of a square, or (height, width)."""
        return self.crop_size

    @property
    def input_shape(self) -> tuple[int, int]:
        """The height and width of the model's input, in pixels."""
        return height_and_width(self.crop_size)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the content-addressed files that this step needs."""
        return ()

    @property
    def min_decoded_side(self) -> int | None:
        """Twice the resize target. The lowest cosines to exact decoding in
        ``benchmarks/fidelity.py`` are 0.9991 (SqueezeNet) and 0.9986 (EfficientNet-Lite0).
        """
        target = max(height_and_width(self.resize_size))
        return 2 * target if self.decode == "scaled" else None

    def with_input_size(self, input_size: int | tuple[int, int]) -> Preprocessing:
        """Returns the preprocessing for another input size.

        Each side of ``resize_size`` keeps its ratio to that of ``crop_size``, and is rounded down.
        """
        if input_size == self.crop_size:
            return self
        sides = zip(
            height_and_width(input_size),
            height_and_width(self.resize_size),
            self.input_shape,
            strict=True,
        )
        height, width = (new * resize // crop for new, resize, crop in sides)
        return dataclasses.replace(self, resize_size=(height, width), crop_size=input_size)

    def __post_init__(self) -> None:
        check_choice("decode", self.decode, DECODES)
        check_choice("interpolation", self.interpolation, ("bilinear", "bicubic"))
        check_choice("crop_offset", self.crop_offset, ("round", "floor"))
        object.__setattr__(self, "background", check_colour("background", self.background))
        object.__setattr__(self, "value_range", check_range("value_range", self.value_range))
        for option in ("crop_size", "resize_size"):
            object.__setattr__(self, option, check_size(option, getattr(self, option)))
        resized = height_and_width(self.resize_size)
        if any(side < crop for side, crop in zip(resized, self.input_shape, strict=True)):
            raise OptionError(
                f"resize_size={self.resize_size} is not valid: "
                f"use at least crop_size={self.crop_size}"
            )
        for option in ("mean", "std"):
            value = getattr(self, option)
            if not isinstance(value, tuple) or len(value) != 3 or not all(map(_is_finite, value)):
                raise OptionError(f"{option} is not valid: use a tuple of 3 numbers, R, G and B")
        if min(self.std) <= 0:
            raise OptionError(f"std={self.std} is not valid: use numbers above 0")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns the sides of a size in pixels; an integer is the side of a square."""
    return size if isinstance(size, tuple) else (size, size)


@dataclass(frozen=True)
class Tokenization:
    """The steps from a text to int32 tokens: clean, encode, truncate to ``context_length``, pad.

    Attributes:
        vocabulary: The name of a content-addressed file for Hugging Face's ``tokenizers``.
        clean: The cleaning before encoding, as in open_clip: ``"whitespace"`` repairs mojibake and
            HTML entities and collapses white space, ``"lower"`` also converts to lower case,
            ``"canonicalize"`` also removes punctuation. ``"none"`` if the vocabulary does it.
        words: A regular expression whose matches are encoded separately; empty if the vocabulary
            splits texts itself.
        context_length: The number of tokens of a text, including the start and end tokens.
        zeroed: A token that is replaced by 0 after encoding.
        reads_padding: Whether vectors depend on the padding. If not, a batch is as long as its
            longest text.
    """

    vocabulary: str
    clean: Literal["none", "whitespace", "lower", "canonicalize"]
    words: str
    context_length: int
    zeroed: int | None
    reads_padding: bool

    @property
    def input_size(self) -> int:
        """The number of tokens of the model's input."""
        return self.context_length

    @property
    def input_shape(self) -> tuple[int]:
        """The number of tokens of the model's input."""
        return (self.context_length,)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the content-addressed files that this step needs."""
        return (self.vocabulary,)


DECODING = ("decode", "background", "value_range")
"""The options that are fields of ``Preprocessing`` as they are."""


def with_decoding(
    preprocessing: Preprocessing | Tokenization, options: Mapping[str, Any]
) -> Preprocessing | Tokenization:
    """Returns ``preprocessing`` with the options in ``DECODING``, or a ``Tokenization``."""
    if isinstance(preprocessing, Tokenization):
        return preprocessing
    return dataclasses.replace(preprocessing, **{name: options[name] for name in DECODING})


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that determines the numbers of a feature vector.

    Attributes:
        model: The model's name, ``factory:<module>.<qualname>`` for a factory,
            ``pt2:<name without suffix>`` or ``onnx:<name without suffix>`` for a file, or
            ``<library>:<name>`` for a folder.
        weights: ``sha256:<hex digest of the weights file>`` (the ``.pt2`` file), or ``random``.
        layer: ``"pooled"``, ``"logits"`` or a node name; a tuple for several layers.
        num_features: The length of a vector; a tuple in layer order for several layers.
        preprocessing: The preprocessing of images, or the tokenization of texts.
        precision: The lowest precision of the forward pass. Workers may compute in a higher one.
        normalize: Whether vectors are scaled to length 1.
        code: A digest of a factory's code, or of a configuration that comes with the weights; empty
            for other models.
    """

    model: str
    weights: str
    layer: str | tuple[str, ...]
    num_features: int | tuple[int, ...]
    preprocessing: Preprocessing | Tokenization
    precision: str
    normalize: bool
    code: str = ""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_bool("normalize", self.normalize)
        for size in self.sizes:
            check_positive("num_features", size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The length of each layer's vector, in order."""
        return self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)

    @property
    def layer_sizes(self) -> dict[str, int] | None:
        """The length of each layer's vector, in order; ``None`` for a single layer."""
        if isinstance(self.num_features, int):
            return None
        return dict(zip(self.layer, self.num_features, strict=True))

    def to_json(self) -> str:
        """Returns the spec as JSON with sorted keys.

        Fields that were added later are omitted at their defaults, so that fingerprints remain.
        """
        fields = dataclasses.asdict(self)
        for part, name, default in (
            (fields, "code", ""),
            (fields["preprocessing"], "crop_offset", "round"),
            (fields["preprocessing"], "background", None),
            (fields["preprocessing"], "value_range", None),
        ):
            if part.get(name, default) == default:
                part.pop(name, None)
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """Builds a spec from the result of ``to_json``."""
        fields: dict[str, Any] = json.loads(text)
        pre: dict[str, Any] = fields.pop("preprocessing")
        tuples = ("mean", "std", "resize_size", "crop_size", "value_range")
        for part, names in ((pre, tuples), (fields, ("layer", "num_features"))):
            for name in names:
                if isinstance(part.get(name), list):
                    part[name] = tuple(part[name])
        kind = Tokenization if "vocabulary" in pre else Preprocessing
        return cls(preprocessing=kind(**pre), **fields)

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal for two specs if and only if their vectors are comparable."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of a Spark column of these features: see ``imagevec.provenance``."""
        made_of = {**json.loads(self.to_json()), "fingerprint": self.fingerprint}
        return {METADATA_KEY: {**made_of, "imagevec": __version__}}


@dataclass(frozen=True)
class ExecutionOptions:
    """How vectors are computed and returned. ``Options`` describes the fields.

    In a plan, ``device`` is ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    """

    device: str
    batch_size: int | Literal["auto"]
    max_pixels: int
    max_bytes: int
    formats: tuple[str, ...]
    allowed_roots: tuple[str, ...]
    read_timeout_seconds: int
    on_error: str
    isolate: bool
    output: str
    truncated: str
    boxes: str | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ExecutionOptions:
        """Selects the options that do not belong to ``FeatureSpec``.

        Raises:
            OptionError: An option is not valid.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**checked({name: options[name] for name in names}))
