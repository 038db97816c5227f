"""The options, in one table: name, default, check and one line of help.

``Options`` types them for callers, and tests hold it, the README and the command line to the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from imagevec.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

PRECISIONS = ("float32", "bfloat16", "float16", "int8")

# The backends: imagevec/engines/<name>.py. "auto" takes the first that can run the plan.
ENGINES = ("openvino", "torch")

DECODES = ("exact", "scaled")

RANDOM = "random"
WEIGHTS_SUFFIXES = (".pth", ".pt", ".safetensors")


class Options(TypedDict, total=False):
    """The keyword options of ``features_udf``, ``make_features_udf`` and ``ImageVectorizer``."""

    model: str | Path | Callable[[], nn.Module]
    """A name of ``list_models()``, ``"timm/<name>"``, ``"open_clip/<name>"``, a zero-argument
    factory of an ``nn.Module``, the path of a saved model, or of a ``.pt2`` file, whose loading can
    run code that is in it: see ``imagevec.models.exported``. Default ``"resnet50"``."""
    weights: str | Path
    """The name of torchvision's weights or of open_clip's (a pretrained tag), a path to ``.pth``,
    ``.pt`` or ``.safetensors``, or ``"random"`` (seeded: the same on every worker). Default
    ``"DEFAULT"``."""
    layer: str | Sequence[str]
    """``"pooled"`` (the input of the classifier's last linear layer), ``"logits"``, or a node of
    ``torchvision.models.feature_extraction.get_graph_node_names``. Several, all of one forward
    pass, give a struct with a vector a layer. Default ``"pooled"``."""
    normalize: bool
    """L2-normalise each vector. Default ``False``."""
    precision: Literal["float32", "bfloat16", "float16", "int8", "auto"]
    """``"float16"`` needs CUDA; ``"int8"`` needs a saved model of ``quantize``; ``"auto"`` is
    bfloat16 where the driver's CPU or GPU has it, else float32. Default ``"float32"``."""
    engine: Literal["auto", "torch", "openvino"]
    """What runs the forward pass. Default ``"auto"``: PyTorch on CUDA, and on the CPU OpenVINO if
    it is installed."""
    device: str
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. Default ``"auto"``, which the driver
    decides: CUDA where Spark assigns GPUs to tasks, or where this machine runs the tasks and has
    one, else the CPU. Which of several GPUs is decided in the task: the one that Spark assigned,
    else the first."""
    batch_size: int | Literal["auto"]
    """Images in one forward pass. Default ``"auto"``."""
    max_pixels: int
    """A larger image is an error row, by its header. Default 89,478,485, which is Pillow's."""
    formats: str | Sequence[str]
    """The formats that are decoded; all others are error rows. Default ``FORMATS``."""
    allowed_roots: str | Sequence[str]
    """Where paths in the input column may lead: absolute folders and prefixes of URIs, such as
    ``"s3://bucket/photos"`` or ``"s3://"``. Default ``()``: anywhere that the worker can read."""
    read_timeout_seconds: int
    """A read of a path that fails is tried again, with longer and longer pauses. After this time it
    fails the task instead. It does not concern files that do not exist: these are error rows at
    once. Default 120."""
    decode: Literal["exact", "scaled"]
    """``"scaled"`` decodes JPEGs at the smallest scale that keeps twice ``resize_size``, which is
    faster for large ones. Default ``"exact"``."""
    on_error: Literal["null", "raise"]
    """A bad image gives a null, or fails the query with its reason. Default ``"null"``."""
    isolate: bool
    """Decode in child processes, so that an image that crashes or hangs its decoder is an error
    row too. It costs some 100 MB for each decoding thread of a worker, and a second at its start.
    Default ``False``."""
    output: Literal["array", "struct"]
    """``array<float>``, or ``struct<features: array<float>, error: string, width: int,
    height: int>``. With several layers, ``struct<<layer>: array<float>, ...>`` takes the place of
    ``array<float>``; it is never null itself, since no pandas UDF can return a null struct: where
    there is no image, each of its fields is. Default ``"array"``."""


class TextOptions(TypedDict, total=False):
    """The keyword options of ``text_features`` and ``text_features_udf``: see ``Options``."""

    weights: str | Path
    normalize: bool
    precision: Literal["float32", "bfloat16", "float16", "auto"]
    engine: Literal["auto", "torch", "openvino"]
    device: str
    batch_size: int | Literal["auto"]
    """Texts in one forward pass."""


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Attributes:
        name: As in ``Options``.
        default: Its value where none is given.
        kind: What sort of value it is: ML Params and command-line arguments follow from it.
        check: The value as it is used, or an ``OptionError``.
        help: One line for a person.
        choices: Its values, if ``kind`` is ``"choice"``.
    """

    name: str
    default: Any
    kind: Literal[
        "model", "path", "layer", "names", "flag", "choice", "text", "auto_or_count", "count"
    ]
    check: Callable[[Option, Any], Any]
    help: str
    choices: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """The help with the choices."""
        if not self.choices:
            return self.help
        return f"{self.help}: {', '.join(self.choices[:-1])} or {self.choices[-1]}"


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``OptionError`` with the nearest choices if ``value`` is none of them."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{option}={value!r} is not known: {did_you_mean(value, choices)}")


def check_positive(option: str, value: object) -> None:
    """Raises ``OptionError`` unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{option}={value!r} is not valid: use an integer of at least 1")


def check_bool(option: str, value: object) -> None:
    """Raises ``OptionError`` unless ``value`` is a boolean."""
    if not isinstance(value, bool):
        raise OptionError(f"{option}={value!r} is not valid: use True or False")


def _model(option: Option, value: Any) -> Any:
    if not (isinstance(value, str | Path) or callable(value)):
        raise OptionError(
            f"{option.name}={value!r} is not valid: give a name or a zero-argument factory"
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
    """One name as it is, several as a tuple. Whether there are such layers is for the model."""
    if isinstance(value, str):
        return value
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(name, str) for name in value)
    ):
        raise OptionError(
            f"{option.name}={value!r} is not valid: give names, ('layer3', 'pooled') for example"
        )
    for name in value:
        if value.count(name) > 1:
            raise OptionError(f"{option.name}={value!r} is not valid: give {name!r} once")
    return tuple(value)


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
    check_positive(option.name, value)
    return cast(int, value)


def _auto_or_count(option: Option, value: Any) -> int | str:
    return "auto" if value == "auto" else _count(option, value)


def _names(option: Option, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise OptionError(f"{option.name}={value!r} is not valid: give a list of strings")
    return tuple(value)


def _formats(option: Option, value: Any) -> tuple[str, ...]:
    names = _names(option, value)
    if not names:
        raise OptionError(f"{option.name} is empty: choose from {', '.join(FORMATS)}")
    for name in names:
        check_choice(option.name, name, FORMATS)
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
        "a model's name, timm/<name>, open_clip/<name>, a factory, the folder of a saved model, "
        "or a .pt2 file",
    ),
    Option(
        "weights",
        "DEFAULT",
        "path",
        _weights,
        "the name of pretrained weights, a .pth, .pt or .safetensors file, or random",
    ),
    Option(
        "layer",
        "pooled",
        "layer",
        _layer,
        "pooled, logits, or the name of a node of the model; several give a struct",
    ),
    Option("normalize", False, "flag", _flag, "give each vector length 1"),
    Option(
        "precision",
        "float32",
        "choice",
        _choice,
        "the arithmetic of the forward pass",
        (*PRECISIONS, "auto"),
    ),
    Option("engine", "auto", "choice", _choice, "what runs the forward pass", ("auto", *ENGINES)),
    Option("device", "auto", "text", _device, "cpu, cuda, cuda:N, or auto"),
    Option("batch_size", "auto", "auto_or_count", _auto_or_count, "images in one forward pass"),
    Option(
        "max_pixels",
        89_478_485,  # Pillow's
        "count",
        _count,
        "a larger image is a bad image, by its header",
    ),
    Option("formats", FORMATS, "names", _formats, "the formats that are decoded"),
    Option(
        "allowed_roots",
        (),
        "names",
        _roots,
        "folders and prefixes of URIs under which paths are read; by default anywhere",
    ),
    Option(
        "read_timeout_seconds",
        120,
        "count",
        _count,
        "how long a read of a path is tried again before it fails the task",
    ),
    Option(
        "decode",
        "exact",
        "choice",
        _choice,
        "scaled decodes large JPEGs at a fraction of their size",
        DECODES,
    ),
    Option(
        "on_error",
        "null",
        "choice",
        _choice,
        "whether a bad image gives a null or fails the query",
        ("null", "raise"),
    ),
    Option("isolate", False, "flag", _flag, "decode in child processes"),
    Option(
        "output",
        "array",
        "choice",
        _choice,
        "whether a row is a vector, or a struct with its error and size",
        ("array", "struct"),
    ),
)

_BY_NAME = {option.name: option for option in OPTIONS}

DEFAULTS = cast(Options, {option.name: option.default for option in OPTIONS})


def checked(options: Mapping[str, Any], known: Collection[str] = _BY_NAME.keys()) -> dict[str, Any]:
    """The given options as they are used, without those that are not given.

    Args:
        options: By name.
        known: The names that are accepted.

    Raises:
        OptionError: A name is unknown or a value is wrong; the message has the nearest valid ones.
    """
    for name in options.keys() - known:
        raise OptionError(f"the option {name!r} is not known: {did_you_mean(name, known)}")
    return {name: _BY_NAME[name].check(_BY_NAME[name], value) for name, value in options.items()}
