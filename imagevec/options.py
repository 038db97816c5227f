"""The table of options: the name, default, check and one-line help of each.

``Options`` types the options for callers. Tests compare it, the README and the command line with
the table.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from imagevec.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from pyspark.sql import Column
    from torch import nn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""The formats that are accepted by default. HEIF needs the extra ``heif`` on the workers."""

OTHER_FORMATS = ("JPEG2000", "ICO")
"""The formats that are accepted where ``formats`` names them."""

PRECISIONS = ("float32", "bfloat16", "float16", "int8")

# The backends, in imagevec/engines/<name>.py. "auto" uses the first one that can run the plan.
ENGINES = ("openvino", "torch")

DECODES = ("exact", "scaled")

TRUNCATED = ("error", "accept")

MAX_BYTES = 500_000_000
"""The largest accepted file."""

RANDOM = "random"
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".index.json")


class Options(TypedDict, total=False):
    """The keyword options of ``features_udf``, ``make_features_udf`` and ``ImageVectorizer``."""

    model: str | Path | Callable[[], nn.Module]
    """A name from ``list_models()``, ``"timm/<name>"``, ``"open_clip/<name>"``,
    ``"transformers/<name>"``, a zero-argument factory that returns an ``nn.Module``, the folder of
    a saved model or of one of transformers, or the path of an ``.onnx`` or ``.pt2`` file. For timm
    and open_clip, a name may be ``hf-hub:<owner>/<name>`` or ``local-dir:<folder>``. Loading a
    ``.pt2`` file can run code that it contains: see ``imagevec.models.exported``. Default
    ``"resnet50"``."""
    weights: str | Path
    """The name of pretrained weights (a torchvision name or an open_clip tag), the path or URI of a
    checkpoint, such as a ``.pth``, ``.ckpt`` or ``.safetensors`` file, or ``"random"`` (seeded:
    identical on every worker). Default ``"DEFAULT"``."""
    layer: str | Sequence[str]
    """``"pooled"`` (the input of the classifier's last linear layer), ``"logits"``, or a node name
    from ``torchvision.models.feature_extraction.get_graph_node_names``. Several layers are computed
    in one forward pass and return a struct with one vector per layer. Default ``"pooled"``."""
    input_size: int | Sequence[int] | None
    """The size of the model's input, in pixels: the side of a square, or ``(height, width)``.
    Default ``None``: the size that the weights were trained for."""
    normalize: bool
    """L2-normalise each vector. Default ``False``."""
    precision: Literal["float32", "bfloat16", "float16", "int8", "auto"]
    """The lowest precision to accept: a worker whose processor has no bfloat16 instructions uses
    float32 instead of bfloat16. ``"float16"`` requires CUDA; ``"int8"`` requires a saved model
    created by ``quantize``; ``"auto"`` is the precision of a saved model, else bfloat16. Default
    ``"float32"``."""
    engine: Literal["auto", "torch", "openvino"]
    """The library that runs the forward pass. Default ``"auto"``: PyTorch on CUDA; on the CPU,
    OpenVINO if it is installed."""
    device: str
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. Default ``"auto"``, which the driver
    resolves: CUDA if Spark assigns GPUs to tasks, or if the tasks run on this machine and it has a
    GPU, else the CPU. With several GPUs, each task uses the one that Spark assigned to it, or else
    the first."""
    batch_size: int | Literal["auto"]
    """Number of images per forward pass. Default ``"auto"``."""
    max_pixels: int
    """The largest accepted image, in pixels, checked in the header. Larger images become error
    rows. Default 89,478,485, the same as Pillow's."""
    max_bytes: int
    """The largest accepted file, in bytes. Larger files become error rows, and are not read.
    Default 500,000,000."""
    formats: str | Sequence[str]
    """The accepted image formats, from ``FORMATS`` and ``OTHER_FORMATS``. Images in other formats
    become error rows. Default ``FORMATS``."""
    allowed_roots: str | Sequence[str]
    """Absolute folders and URI prefixes, such as ``"s3://bucket/photos"`` or ``"s3://"``, under
    which paths in the input column may be read. Default ``()``: any path that the worker can
    read."""
    read_timeout_seconds: int
    """How long a failed read is retried, with increasing pauses, before it fails the task. A file
    that does not exist is not retried: it becomes an error row immediately. Default 120."""
    decode: Literal["exact", "scaled"]
    """``"scaled"`` decodes JPEGs at the smallest scale that keeps twice ``resize_size``, which is
    faster for large images. Default ``"exact"``."""
    background: str | Sequence[int] | None
    """The colour behind transparent pixels: a name or ``"#rrggbb"``, as in Pillow's ``ImageColor``,
    or three numbers from 0 to 255. Default ``None``: alpha is dropped, as in torchvision, which
    shows whatever colour the transparent pixels have."""
    value_range: Sequence[float] | None
    """``(low, high)``, the values that become black and white in images of integers of more than 8
    bits and of floats. Default ``None``: the range that the file declares, or the full range of
    unsigned 16-bit integers. Without either, an image becomes an error row."""
    truncated: Literal["error", "accept"]
    """``"accept"`` takes the pixels that a truncated file still has. Default ``"error"``."""
    boxes: str | Column | None
    """The name of a column of boxes, ``array<struct<left, top, width, height>>`` in pixels of the
    image as displayed; ``features_udf`` also accepts a ``Column``. An image is decoded once, always
    at full size, and the result is an array with a vector for each box, which is cropped as by
    Pillow. Default ``None``: a vector of the whole image."""
    on_error: Literal["null", "raise"]
    """``"null"`` returns a null for a bad image; ``"raise"`` fails the query with the reason.
    Default ``"null"``."""
    isolate: bool
    """Decode in child processes, so that an image that crashes or hangs the decoder becomes an
    error row. Costs about 100 MB per decoding thread of a worker, and a second when a worker
    starts. Default ``False``."""
    output: Literal["array", "struct"]
    """``array<float>``, or ``struct<features: array<float>, error: string, width: int,
    height: int, truncated: boolean>``. With several layers, ``struct<<layer>: array<float>, ...>``
    replaces ``array<float>``. A pandas UDF cannot return a null struct, so without an image every
    field of this struct is null instead. With ``boxes``, ``array<array<float>>`` replaces
    ``array<float>``, and ``box_errors: array<string>`` has a null for each good box. Default
    ``"array"``."""


class TextOptions(TypedDict, total=False):
    """The keyword options of ``text_features`` and ``text_features_udf``: see ``Options``."""

    weights: str | Path
    normalize: bool
    precision: Literal["float32", "bfloat16", "float16", "auto"]
    engine: Literal["auto", "torch", "openvino"]
    device: str
    batch_size: int | Literal["auto"]
    """Number of texts per forward pass."""


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Attributes:
        name: The key in ``Options``.
        default: The value of an omitted option.
        kind: The kind of value, which determines the ML Param and the command-line argument.
        check: A function that returns the normalised value or raises ``OptionError``.
        help: A one-line description for users.
        choices: The accepted values if ``kind`` is ``"choice"``.
    """

    name: str
    default: Any
    kind: Literal[
        "model",
        "path",
        "layer",
        "size",
        "names",
        "range",
        "flag",
        "choice",
        "text",
        "auto_or_count",
        "count",
    ]
    check: Callable[[Option, Any], Any]
    help: str
    choices: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """The help, followed by the choices."""
        if not self.choices:
            return self.help
        return f"{self.help}: {', '.join(self.choices[:-1])} or {self.choices[-1]}"


def names_file(weights: str) -> bool:
    """Returns whether a ``weights`` option is a path or URI, not the name of weights."""
    return "/" in weights or os.sep in weights or weights.lower().endswith(WEIGHTS_SUFFIXES)


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``OptionError`` with the nearest choices if ``value`` is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{option}={value!r} is not known: {did_you_mean(value, choices)}")


def check_positive(option: str, value: object) -> int:
    """Returns an integer of any kind, such as NumPy's, as an ``int``.

    Raises:
        OptionError: The value is not an integer of at least 1.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{option}={value!r} is not valid: use an integer of at least 1")
    return int(value)


def check_size(option: str, value: object) -> int | tuple[int, int]:
    """Returns a size in pixels: an ``int`` for a square, else ``(height, width)``.

    Raises:
        OptionError: The value is neither an integer of at least 1 nor two of them.
    """
    sides = value if isinstance(value, list | tuple) else (value, value)
    try:
        height, width = (check_positive(option, side) for side in sides)
    except ValueError:  # also an OptionError
        raise OptionError(
            f"{option}={value!r} is not valid: use an integer of at least 1, or two: "
            "(height, width)"
        ) from None
    return height if height == width else (height, width)


def check_colour(option: str, value: object) -> str | None:
    """Returns a colour as ``"#rrggbb"``, or ``None``.

    Raises:
        OptionError: The value is neither a colour of Pillow's ``ImageColor`` without alpha nor
            three integers from 0 to 255.
    """
    if value is None:
        return None
    from PIL import ImageColor

    try:
        rgb = ImageColor.getrgb(value) if isinstance(value, str) else value
        red, green, blue = (
            -1 if isinstance(level, bool) else operator.index(level)
            for level in (rgb if isinstance(rgb, list | tuple) else ())
        )
    except (TypeError, ValueError):
        red = green = blue = -1
    if not all(0 <= level <= 255 for level in (red, green, blue)):
        raise OptionError(
            f"{option}={value!r} is not a colour: use a name such as 'white', '#rrggbb', or three "
            "integers from 0 to 255"
        )
    return f"#{red:02x}{green:02x}{blue:02x}"


def check_range(option: str, value: object) -> tuple[float, float] | None:
    """Returns ``(low, high)`` as floats, or ``None``.

    Raises:
        OptionError: The value is not two numbers whose difference, as floats, is positive and
            finite.
    """
    if value is None:
        return None
    ends = value if isinstance(value, list | tuple) else ()
    try:
        low, high = (_number(end) for end in ends)
        is_range = 0 < high - low < math.inf
    except (TypeError, ValueError, OverflowError):
        is_range = False
    if not is_range:
        raise OptionError(
            f"{option}={value!r} is not valid: use two numbers, (low, high), the second above the "
            "first"
        )
    return low, high


def _number(value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError
    return float(value)


def check_bool(option: str, value: object) -> None:
    """Raises ``OptionError`` unless ``value`` is a boolean."""
    if not isinstance(value, bool):
        raise OptionError(f"{option}={value!r} is not valid: use True or False")


def _model(option: Option, value: Any) -> Any:
    if not (isinstance(value, str | Path) or callable(value)):
        raise OptionError(
            f"{option.name}={value!r} is not valid: use a name or a zero-argument factory"
        )
    return value


def _weights(option: Option, value: Any) -> str:
    if not isinstance(value, str | Path):
        raise OptionError(
            f"{option.name}={value!r} is not valid: use 'DEFAULT', 'random', a weights name, or a "
            f"path that ends in {', '.join(WEIGHTS_SUFFIXES)}"
        )
    return str(value)


def _layer(option: Option, value: Any) -> str | tuple[str, ...]:
    """Returns one name unchanged, several as a tuple. The model checks whether they exist."""
    if isinstance(value, str):
        return value
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(name, str) for name in value)
    ):
        raise OptionError(
            f"{option.name}={value!r} is not valid: use names, for example ('layer3', 'pooled')"
        )
    for name in value:
        if value.count(name) > 1:
            raise OptionError(f"{option.name}={value!r} is not valid: list {name!r} only once")
    return tuple(value)


def _size(option: Option, value: Any) -> int | tuple[int, int] | None:
    return None if value is None else check_size(option.name, value)


def _colour(option: Option, value: Any) -> str | None:
    return check_colour(option.name, value)


def _range(option: Option, value: Any) -> tuple[float, float] | None:
    return check_range(option.name, value)


def _column(option: Option, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise OptionError(f"{option.name}={value!r} is not valid: use the name of a column")
    return value


def _flag(option: Option, value: Any) -> bool:
    check_bool(option.name, value)
    return cast(bool, value)


def _choice(option: Option, value: Any) -> str:
    check_choice(option.name, value, option.choices)
    return cast(str, value)


def _device(option: Option, value: Any) -> str:
    kind, _, index = str(value).partition(":")
    if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        check_choice(option.name, value, ("auto", "cpu", "cuda", "cuda:0"))
    return cast(str, value)


def _count(option: Option, value: Any) -> int:
    return check_positive(option.name, value)


def _auto_or_count(option: Option, value: Any) -> int | str:
    return "auto" if value == "auto" else _count(option, value)


def _names(option: Option, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise OptionError(f"{option.name}={value!r} is not valid: use a list of strings")
    return tuple(value)


def _formats(option: Option, value: Any) -> tuple[str, ...]:
    names = _names(option, value)
    if not names:
        raise OptionError(f"{option.name} is empty: choose from {', '.join(FORMATS)}")
    for name in names:
        check_choice(option.name, name, (*FORMATS, *OTHER_FORMATS))
    return names


def _roots(option: Option, value: Any) -> tuple[str, ...]:
    roots = _names(option, value)
    for root in roots:
        if not root.startswith("/") and ":" not in root:
            raise OptionError(f"{option.name}={root!r} is not valid: use an absolute path")
    return roots


OPTIONS = (
    Option(
        "model",
        "resnet50",
        "model",
        _model,
        "a model name, timm/<name>, open_clip/<name>, transformers/<name>, a factory, the folder "
        "of a model, or an .onnx or .pt2 file",
    ),
    Option(
        "weights",
        "DEFAULT",
        "path",
        _weights,
        "a weights name, the path or URI of a checkpoint, or random",
    ),
    Option(
        "layer",
        "pooled",
        "layer",
        _layer,
        "pooled, logits, or a node name; several layers return a struct",
    ),
    Option(
        "input_size",
        None,
        "size",
        _size,
        "size of the model's input in pixels: the side of a square, or the height and width",
    ),
    Option("normalize", False, "flag", _flag, "scale each vector to length 1"),
    Option(
        "precision",
        "float32",
        "choice",
        _choice,
        "lowest precision of the forward pass to accept",
        (*PRECISIONS, "auto"),
    ),
    Option("engine", "auto", "choice", _choice, "library of the forward pass", ("auto", *ENGINES)),
    Option("device", "auto", "text", _device, "cpu, cuda, cuda:N, or auto"),
    Option("batch_size", "auto", "auto_or_count", _auto_or_count, "images per forward pass"),
    Option(
        "max_pixels",
        89_478_485,  # Pillow's
        "count",
        _count,
        "treat larger images as bad images, judged by their headers",
    ),
    Option("max_bytes", MAX_BYTES, "count", _count, "treat larger files as bad images"),
    Option("formats", FORMATS, "names", _formats, "formats to accept"),
    Option(
        "allowed_roots",
        (),
        "names",
        _roots,
        "folders and URI prefixes under which paths may be read; by default anywhere",
    ),
    Option(
        "read_timeout_seconds",
        120,
        "count",
        _count,
        "how long to retry a failed read or write before the task fails",
    ),
    Option(
        "decode",
        "exact",
        "choice",
        _choice,
        "scaled decodes large JPEGs at a reduced size",
        DECODES,
    ),
    Option(
        "background",
        None,
        "text",
        _colour,
        "colour behind transparent pixels, such as white; by default alpha is dropped",
    ),
    Option(
        "value_range",
        None,
        "range",
        _range,
        "values that become black and white in images of more than 8 bits per channel",
    ),
    Option(
        "truncated",
        "error",
        "choice",
        _choice,
        "whether to accept the pixels that a truncated file still has",
        TRUNCATED,
    ),
    Option(
        "boxes",
        None,
        "text",
        _column,
        "column of boxes, structs of left, top, width and height; each box becomes a vector",
    ),
    Option(
        "on_error",
        "null",
        "choice",
        _choice,
        "whether a bad image returns a null or fails the query",
        ("null", "raise"),
    ),
    Option("isolate", False, "flag", _flag, "decode in child processes"),
    Option(
        "output",
        "array",
        "choice",
        _choice,
        "whether a row is a vector, or a struct with the error and the image size",
        ("array", "struct"),
    ),
)

_BY_NAME = {option.name: option for option in OPTIONS}

DEFAULTS = cast(Options, {option.name: option.default for option in OPTIONS})


def checked(options: Mapping[str, Any], known: Collection[str] = _BY_NAME.keys()) -> dict[str, Any]:
    """Returns the checked and normalised values of the given options only.

    Args:
        options: Values by option name.
        known: The accepted names.

    Raises:
        OptionError: A name or a value is not valid. The message lists the nearest valid ones.
    """
    for name in options.keys() - known:
        raise OptionError(f"the option {name!r} is not known: {did_you_mean(name, known)}")
    return {name: _BY_NAME[name].check(_BY_NAME[name], value) for name, value in options.items()}
