"""What a feature vector is (``FeatureSpec``) and how it is computed (``ExecutionOptions``).

The first fixes the numbers, the second may only change speed, limits and the form of the result.
Both are frozen, validated when made, and small: they are what travels to Spark's workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from imagevec._version import __version__
from imagevec.errors import OptionError
from imagevec.options import DECODES, PRECISIONS, check_bool, check_choice, check_positive, checked

METADATA_KEY = "imagevec"


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
    def input_size(self) -> int:
        """Pixels of each side of the model's input."""
        return self.crop_size

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the content-addressed files that it needs."""
        return ()

    @property
    def min_decoded_side(self) -> int | None:
        """Twice the resize target: the lowest cosines to the exact path that
        ``benchmarks/fidelity.py`` found are 0.9991 (SqueezeNet) and 0.9986 (EfficientNet-Lite0).
        """
        return 2 * self.resize_size if self.decode == "scaled" else None

    def __post_init__(self) -> None:
        check_choice("decode", self.decode, DECODES)
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
class Tokenization:
    """A text to int32 tokens: clean, encode, cut at ``context_length``, pad.

    Attributes:
        vocabulary: The name of a content-addressed file, of Hugging Face's ``tokenizers``.
        clean: What is done to a text first, as open_clip does it: ``"whitespace"`` repairs mojibake
            and HTML entities and collapses white space, ``"lower"`` also makes it lower case,
            ``"canonicalize"`` also removes punctuation.
        words: A regular expression whose matches are encoded one by one; empty if the vocabulary
            splits texts itself.
        context_length: Tokens of a text, those that mark its start and end included.
        zeroed: A token that is replaced by 0 after encoding.
        reads_padding: Whether vectors depend on the padding. If not, a batch is as long as its
            longest text.
    """

    vocabulary: str
    clean: Literal["whitespace", "lower", "canonicalize"]
    words: str
    context_length: int
    zeroed: int | None
    reads_padding: bool

    @property
    def input_size(self) -> int:
        """Tokens of the model's input."""
        return self.context_length

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the content-addressed files that it needs."""
        return (self.vocabulary,)


def with_decode(
    preprocessing: Preprocessing | Tokenization, decode: Literal["exact", "scaled"]
) -> Preprocessing | Tokenization:
    """The same with another ``decode``, which texts do not have."""
    if isinstance(preprocessing, Tokenization):
        return preprocessing
    return dataclasses.replace(preprocessing, decode=decode)


@dataclass(frozen=True)
class FeatureSpec:
    """All that fixes the numbers of a feature vector.

    Attributes:
        model: The model's name; a factory's is ``factory:<module>.<qualname>``, a ``.pt2`` file's
            ``pt2:<name without suffix>``.
        weights: ``sha256:<hex digest of the weights file>`` (the ``.pt2`` file), or ``random``.
        layer: ``"pooled"``, ``"logits"`` or a node name; several as a tuple.
        num_features: The length of a vector; of each layer's, in order, if there are several.
        preprocessing: What happens to the pixels before the model, or to the texts.
        precision: The arithmetic of the forward pass.
        normalize: Whether each vector has length 1.
    """

    model: str
    weights: str
    layer: str | tuple[str, ...]
    num_features: int | tuple[int, ...]
    preprocessing: Preprocessing | Tokenization
    precision: str
    normalize: bool

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_bool("normalize", self.normalize)
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
        for part, names in ((pre, ("mean", "std")), (fields, ("layer", "num_features"))):
            for name in names:
                if isinstance(part.get(name), list):
                    part[name] = tuple(part[name])
        kind = Tokenization if "vocabulary" in pre else Preprocessing
        return cls(preprocessing=kind(**pre), **fields)

    @property
    def fingerprint(self) -> str:
        """16 hex digits: equal for two specs if and only if their vectors are comparable."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of a Spark column of such features: see ``imagevec.provenance``."""
        made_of = {**json.loads(self.to_json()), "fingerprint": self.fingerprint}
        return {METADATA_KEY: {**made_of, "imagevec": __version__}}


@dataclass(frozen=True)
class ExecutionOptions:
    """How vectors are computed and handed back. ``Options`` says what each one means.

    In a plan, ``device`` is ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    """

    device: str
    batch_size: int | Literal["auto"]
    max_pixels: int
    formats: tuple[str, ...]
    allowed_roots: tuple[str, ...]
    read_timeout_seconds: int
    on_error: str
    isolate: bool
    output: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ExecutionOptions:
        """The part of all options that is not ``FeatureSpec``'s.

        Raises:
            OptionError: One of them is wrong.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**checked({name: options[name] for name in names}))
