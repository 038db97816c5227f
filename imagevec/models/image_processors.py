"""Converts ``preprocessor_config.json``, written by Hugging Face's image processors.

The steps and defaults of each kind are those of ``image_processing_<kind>.py`` in transformers,
which this module does not import. Up to rounding, the result of an image is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from imagevec.errors import OptionError, WeightsError
from imagevec.models import hub
from imagevec.spec import Preprocessing

CONFIG = "preprocessor_config.json"
_NESTED = "processor_config.json"  # newer: contains the above as "image_processor"

_INTERPOLATIONS: dict[Any, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_RESAMPLES = {0: "nearest", 1: "Lanczos", 4: "box", 5: "Hamming"}  # PIL.Image.Resampling

_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SQUARE: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_CROP = {
    **_SQUARE,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}

KINDS: dict[str, dict[str, Any]] = {
    "Beit": {**_SQUARE, **_HALF, "crop_size": {"height": 224, "width": 224}},
    "Bit": {**_CROP, **_CLIP},
    "Blip": {**_SQUARE, **_CLIP, "size": {"height": 384, "width": 384}},
    "CLIP": {**_CROP, **_CLIP},
    "ChineseCLIP": {**_CROP, **_CLIP},
    "ConvNext": {**_SQUARE, **_HALF, "size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "DINOv3ViT": {**_SQUARE, **_IMAGENET, "resample": 2},
    "DeiT": {**_CROP, **_HALF, "size": {"height": 256, "width": 256}},
    "EfficientNet": {
        **_SQUARE,
        **_HALF,
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "include_top": True,
    },
    "Levit": {**_CROP, **_IMAGENET},
    "MobileNetV1": {**_CROP, **_HALF, "size": {"shortest_edge": 256}, "resample": 2},
    "MobileNetV2": {**_CROP, **_HALF, "size": {"shortest_edge": 256}, "resample": 2},
    "MobileViT": {
        **_CROP,
        "do_normalize": False,
        "do_flip_channel_order": True,
        "crop_size": {"height": 256, "width": 256},
    },
    "PoolFormer": {**_CROP, **_IMAGENET, "crop_pct": 0.9},
    "Pvt": {**_SQUARE, **_IMAGENET},
    "Segformer": {
        **_SQUARE,
        **_IMAGENET,
        "size": {"height": 512, "width": 512},
        "resample": 2,
    },
    "Siglip": {**_SQUARE, **_HALF},
    "ViT": {**_SQUARE, **_HALF, "resample": 2},
}
"""The defaults of each kind of processor, by the name of its class without ``ImageProcessor``."""

# The steps that have no effect on a single RGB image, or are converted.
_STEPS = [
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_reduce_labels",
    "do_pad",
]

# A size that is a number is the shorter side for these, and the side of a square for the others.
_SHORTER_SIDE = [
    "Bit",
    "CLIP",
    "ChineseCLIP",
    "ConvNext",
    "Levit",
    "MobileNetV1",
    "MobileNetV2",
    "MobileViT",
    "PoolFormer",
    "Siglip",
]

# The options that a kind does not read, whatever its file says.
_ONLY_OF_EFFICIENTNET = {"rescale_offset", "include_top"}
_NOT_READ: dict[str, set[str]] = {
    "EfficientNet": set(),
    "MobileViT": {*_ONLY_OF_EFFICIENTNET, "do_normalize"},
    "Segformer": {*_ONLY_OF_EFFICIENTNET, "do_center_crop"},
}

_LEVIT_RATIO = 256 / 224  # of its resize to "size"
_SQUASHED_SIZE = 384  # from which ConvNext's processor resizes without a crop


def files(folder: Path) -> list[Path]:
    """Returns the files of a folder that ``read`` depends on."""
    return [path for path in (folder / _NESTED, folder / CONFIG) if path.is_file()]


def read(folder: Path, class_name: Callable[[], str] | None = None) -> Preprocessing:
    """Returns the preprocessing that a folder's image processor does.

    Args:
        folder: A folder with ``preprocessor_config.json``.
        class_name: A function that returns the name of the processor's class, for old files
            without it.

    Raises:
        OptionError: The processor does what a ``Preprocessing`` cannot.
        WeightsError: There is no such file, or it is damaged.
    """
    for path in files(folder):
        config: Any = hub.read_json(path)
        if path.name == _NESTED:
            config = config.get("image_processor")
        if config is not None:
            if not isinstance(config, dict):
                raise WeightsError(f"{path} is not valid: it contains no JSON object")
            if class_name is not None and not _class_name(config):
                config = {**config, "image_processor_type": class_name()}
            return to_preprocessing(config)
    raise WeightsError(
        f"{folder} has no {CONFIG}, which says how images are resized and normalised: copy the one "
        "of the model that these weights were trained from, or write it with "
        "AutoImageProcessor.from_pretrained(...).save_pretrained(folder)"
    )


def to_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """Converts the content of ``preprocessor_config.json``.

    Raises:
        OptionError: The processor does what a ``Preprocessing`` cannot.
    """
    name = _class_name(config)
    kind = name.removesuffix("ImageProcessor")
    if kind not in KINDS:
        known = ", ".join(f"{kind}ImageProcessor" for kind in KINDS)
        raise OptionError(
            f"the image processor {name or '(unnamed)'} is not supported; use {known}"
        )
    if "auto_map" in config:
        raise OptionError(f"{name} is not supported: its code is in its folder (auto_map)")
    not_read = _NOT_READ.get(kind, _ONLY_OF_EFFICIENTNET)
    given = {key: value for key, value in config.items() if key not in not_read}
    steps = {"do_center_crop": False, **KINDS[kind], **given}  # null is a step that is not done
    try:
        _check_steps(steps)
        return Preprocessing(**_sizes(kind, steps), **_statistics(steps), crop_offset="floor")
    except (_Unsupported, OptionError) as error:
        raise OptionError(f"{name} is not supported: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:  # of numbers that are not
        raise OptionError(f"{name} is not supported: it has a wrong number ({error})") from error


class _Unsupported(Exception):
    """A step that a ``Preprocessing`` does not have."""


def _class_name(config: Mapping[str, Any]) -> str:
    """Returns the name of the processor's class, in its form of transformers 5."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    name = str(name).replace("FeatureExtractor", "ImageProcessor")
    return name.removesuffix("Fast").removesuffix("Pil")


def _check_steps(steps: Mapping[str, Any]) -> None:
    if steps.get("do_flip_channel_order"):
        raise _Unsupported("it flips the channels to BGR (do_flip_channel_order)")
    if steps.get("do_pad") and steps.get("pad_size"):
        raise _Unsupported(f"it pads images to {steps['pad_size']}")
    for step, is_on in steps.items():
        if step.startswith("do_") and step not in _STEPS and is_on:
            raise _Unsupported(f"it has the step {step}")
    if steps["resample"] not in _INTERPOLATIONS:
        found = _RESAMPLES.get(steps["resample"], "another")
        raise _Unsupported(
            f"resample={steps['resample']} is {found} interpolation; 2 is bilinear, 3 is bicubic"
        )


def _sizes(kind: str, steps: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ``Preprocessing`` that follow from the sizes."""
    if not steps["do_resize"]:
        raise _Unsupported("it does not resize images (do_resize)")
    to_square = steps.get("default_to_square", kind not in _SHORTER_SIDE)
    size: Any = _size("size", steps["size"], not to_square)
    crop: Any = None
    if steps["do_center_crop"]:
        crop = _size("crop_size", steps.get("crop_size"), False)
    if kind == "ConvNext" and isinstance(size, int):
        if size >= _SQUASHED_SIZE:
            size = (size, size)
        else:
            crop = crop or (size, size)
            size = int(size / steps["crop_pct"])
    elif kind == "Levit" and isinstance(size, int):
        size = int(_LEVIT_RATIO * size)
    elif kind == "PoolFormer" and steps["crop_pct"]:
        side = size if isinstance(size, int) else size[0]
        if size not in (side, (side, side)):
            raise _Unsupported(f"its size is {steps['size']}, with crop_pct")
        size = int(side / steps["crop_pct"])
    if crop is None:
        if isinstance(size, int):
            raise _Unsupported("it keeps the aspect ratio of images and does not crop them")
        crop = size
    resized = size if isinstance(size, tuple) else (size, size)
    if resized[0] < crop[0] or resized[1] < crop[1]:
        raise _Unsupported(f"it pads images of {steps['size']} to {steps['crop_size']}")
    return {"resize_size": size, "crop_size": crop, "squash": isinstance(size, tuple)}


def _size(option: str, value: Any, shorter_side: bool) -> int | tuple[int, int]:
    """Returns the length of the shorter side, or ``(height, width)``."""
    if isinstance(value, int):
        return value if shorter_side else (value, value)
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    if isinstance(value, Mapping):
        sides = {key: side for key, side in value.items() if side is not None}
        if sides.keys() == {"height", "width"}:
            return int(sides["height"]), int(sides["width"])
        if sides.keys() == {"shortest_edge"} and option == "size":
            return int(sides["shortest_edge"])
    raise _Unsupported(f"its {option} is {value}: the shortest_edge, or height and width, are")


def _statistics(steps: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mean and standard deviation for pixels from 0 to 1, and the interpolation."""
    factor = steps["rescale_factor"] if steps["do_rescale"] else 1.0
    if not isinstance(factor, int | float) or factor <= 0:
        raise _Unsupported(f"its rescale_factor is {factor!r}, not a number above 0")
    scale = factor * 255
    is_plain = abs(scale - 1) < 1e-6  # else the statistics are those of other numbers
    mean, std = [0.0] * 3, [1.0] * 3
    if steps["do_normalize"]:
        mean, std = _channels(steps, "image_mean"), _channels(steps, "image_std")
    if steps.get("rescale_offset") and steps["do_rescale"]:  # EfficientNet: from -1 instead of 0
        mean = [value + 1 for value in mean]
    if steps.get("include_top"):  # EfficientNet: divides by the standard deviation again
        std = [a * b for a, b in zip(std, _channels(steps, "image_std"), strict=True)]
    if not is_plain:
        mean, std = [value / scale for value in mean], [value / scale for value in std]
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": _INTERPOLATIONS[steps["resample"]],
    }


def _channels(steps: Mapping[str, Any], option: str) -> list[float]:
    value: Any = steps.get(option)
    values = list(value) if isinstance(value, list | tuple) else [value]
    values *= 3 if len(values) == 1 else 1
    if len(values) != 3 or not all(isinstance(channel, int | float) for channel in values):
        raise _Unsupported(f"its {option} is {value}, not one number for each of 3 channels")
    return [float(channel) for channel in values]
