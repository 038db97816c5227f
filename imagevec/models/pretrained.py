"""Builds the models of transformers as modules that return features.

A weights file here is one safetensors file that contains the tensors of a folder, and as metadata
the content of its ``config.json``: workers need nothing else.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from imagevec import cache
from imagevec.errors import ImageVecError, OptionError, WeightsError
from imagevec.models.state_dict import seeded

_CONFIG = "config"  # the key of the metadata
_PART_BYTES = 8 << 20

# Keys of config.json that choose code, types or the form of the output, not the model. The first
# may name a repository whose code would be downloaded and run.
_NOT_USED = {"attn_implementation", "_attn_implementation", "experts_implementation"}
_NOT_USED |= {"_experts_implementation", "_name_or_path", "dtype", "torch_dtype", "fusion_config"}
_NOT_USED |= {"return_dict", "output_hidden_states", "output_attentions", "torchscript"}

_CLASS_TOKENS = ("cls_token", "class_embedding")
# The tokens before the patches: parameters of the shape (..., tokens, width) or (width,).
_PREFIX_TOKENS = (*_CLASS_TOKENS, "distillation_token", "register_tokens")

KINDS = ("projection", "pooler", "cls", "mean")
"""The vectors of an ``ImageTower``. The first of them that a model has is its pooled layer."""

# Tensors of training alone.
_UNUSED_TENSORS = ("mask_token", "logit_scale", "logit_bias")


def save(weights: Path, config: Mapping[str, Any]) -> Path:
    """Writes a weights file to the user's cache.

    Args:
        weights: A safetensors file with the tensors.
        config: The content of ``config.json``.

    Raises:
        WeightsError: The file is damaged.
    """
    try:
        with safe_open(weights, "pt"):
            pass
    except Exception as error:  # of safetensors
        raise WeightsError(f"{weights.name} is damaged or ends early ({error})") from error
    with weights.open("rb") as source, cache.temporary_folder(weights.stat().st_size) as folder:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = {_CONFIG: json.dumps(config, sort_keys=True)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors are aligned
        path = folder / "weights.safetensors"
        with path.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, _PART_BYTES)
        return cache.store(path, move=True)


def save_random(config: Mapping[str, Any]) -> Path:
    """Writes a weights file with random weights, identical on every machine."""
    with quiet(), seeded(), _explained(config):
        settings = _settings(config)
        model = _class(settings, config, "logits")(settings)
    with cache.temporary_folder() as folder:
        path = folder / "random.safetensors"
        save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
        return save(path, config)


def text_settings(config: Mapping[str, Any]) -> Any:
    """Returns the configuration of the text encoder of a ``config.json``."""
    with quiet():
        return _settings(config).get_text_config()


class Checkpoint(nn.Module):
    """A weights file, of which ``image_tower`` or ``text_tower`` builds the part that it needs.

    Args:
        name: The model's name, for messages.
        file: The weights file.
    """

    def __init__(self, name: str, file: Path) -> None:
        super().__init__()
        self.name = name
        self.file = file
        with safe_open(file, "pt") as opened:
            self.config: dict[str, Any] = json.loads(opened.metadata()[_CONFIG])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the pooled features of images."""
        features: torch.Tensor = image_tower(self, "pooled", images)(images)
        return features


def image_tower(
    checkpoint: Checkpoint, layer: str | tuple[str, ...], example: torch.Tensor
) -> nn.Module:
    """Builds a module from images, float32 ``(N, 3, H, W)``, to the vectors of the layers.

    Args:
        checkpoint: The weights.
        layer: The ``layer`` option. With a tuple, the module returns a tuple.
        example: Images of the shape of the input.

    Raises:
        OptionError: The model has no such layer, or cannot take images of this size.
        WeightsError: The weights do not fit the model.
    """
    if layer == "logits" and is_classifier(checkpoint.config):
        model, missing = _loaded(checkpoint, layer)
        _check_complete(checkpoint, missing)
        return _Logits(model, example)
    model, missing = _loaded(checkpoint, "pooled", drop=("text_model", "text_projection"))
    projection = {key for key in missing if "visual_projection" in key.split(".")}
    pooler = {key for key in missing if {"pooler", "head"} & {*key.split(".")}}
    _check_complete(checkpoint, missing - projection - pooler)
    tower = ImageTower(model, example)
    with _runs_on(checkpoint, example), torch.no_grad():
        kinds = list(tower.vectors(example, KINDS))
    if pooler and "pooler" in kinds:  # it would be random
        kinds.remove("pooler")
    if (pooler or projection) and "projection" in kinds:
        kinds.remove("projection")
    layers = {"pooled": kinds[0], **{kind: kind for kind in kinds if kind != "projection"}}
    for name in layer if isinstance(layer, tuple) else (layer,):
        if name not in layers:
            known = [*layers, *(["logits"] if is_classifier(checkpoint.config) else [])]
            raise OptionError(
                f"layer={name!r} is not available in {checkpoint.name!r}, which has "
                f"{', '.join(map(repr, known))}"
            )
    chosen = layer if isinstance(layer, tuple) else (layer,)
    tower.kinds = tuple(layers[name] for name in chosen)
    tower.returns_tuple = isinstance(layer, tuple)
    return tower


def text_tower(checkpoint: Checkpoint) -> nn.Module:
    """Builds a module from the tokens of texts, int32 ``(N, L)``, to ``(N, D)``.

    Raises:
        WeightsError: The weights do not fit the model.
    """
    model, missing = _loaded(checkpoint, "pooled", drop=("vision_model", "visual_projection"))
    _check_complete(checkpoint, missing)
    return TextTower(model)


class ImageTower(nn.Module):
    """An image encoder, alone or of a dual encoder, that returns vectors of images.

    Args:
        model: A model of transformers.
        example: Images of the shape of the input.

    Attributes:
        kinds: The vectors to return, of ``KINDS``.
        returns_tuple: Whether to return a tuple, also of a single vector.
    """

    kinds: tuple[str, ...] = ()
    returns_tuple: bool = False

    def __init__(self, model: Any, example: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self._options = _interpolation(self._encoder, example)
        tokens = _prefix_tokens(self._encoder)
        self._prefix = sum(tokens.values())
        self._has_class_token = any(name in tokens for name in _CLASS_TOKENS)
        if model.config.model_type == "dinov3_convnext":
            self._prefix = 1  # the mean of the others

    @property
    def _encoder(self) -> Any:
        return getattr(self.model, "vision_model", self.model)

    def vectors(self, images: torch.Tensor, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Returns those of the vectors ``(N, D)`` that the model has, and maybe others."""
        found: dict[str, Any] = {}
        if "projection" in kinds and hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=images, **self._options)
            found["projection"] = output.pooler_output
        elif "projection" in kinds and hasattr(self.model, "visual_projection"):
            found["projection"] = self.model(pixel_values=images, **self._options).image_embeds
        if {*kinds} - {"projection"}:
            output = self._encoder(pixel_values=images, **self._options)
            found["pooler"] = output.get("pooler_output")
            found["cls"] = self._class_token(output)
            found["mean"] = self._mean(output.last_hidden_state)
        return {kind: vector.flatten(1) for kind, vector in found.items() if vector is not None}

    def _class_token(self, output: Any) -> torch.Tensor | None:
        tokens = output.get("cls_token_value")  # CvT
        if tokens is None and self._has_class_token:
            tokens = output.last_hidden_state
        token: torch.Tensor | None = None if tokens is None else tokens[:, 0]
        return token

    def _mean(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim == 4:
            return hidden.mean((2, 3))  # (N, D, H, W)
        return hidden[:, self._prefix :].mean(1)  # (N, T, D)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        vectors = self.vectors(images, self.kinds)
        outputs = tuple(vectors[kind] for kind in self.kinds)
        return outputs if self.returns_tuple else outputs[0]


class TextTower(nn.Module):
    """The text encoder of a dual encoder.

    Tokens of at least ``vocab_size`` are padding that the model does not attend to: the token of
    the padding plus ``vocab_size``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._vocab_size: int = model.config.get_text_config().vocab_size

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        is_text = tokens < self._vocab_size
        ids = (tokens % self._vocab_size).long()
        output = self.model.get_text_features(input_ids=ids, attention_mask=is_text.long())
        features: torch.Tensor = output.pooler_output
        return features  # (N, D)


class _Logits(nn.Module):
    def __init__(self, model: Any, example: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self._options = _interpolation(model, example)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=images, **self._options).logits
        return logits  # (N, classes)


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Returns whether the weights of a ``config.json`` have a classifier of images."""
    return "ForImageClassification" in _architecture(config)


def _architecture(config: Mapping[str, Any]) -> str:
    return str(next(iter(config.get("architectures") or [""])))


def _settings(config: Mapping[str, Any]) -> Any:
    """Returns the configuration object of a ``config.json``.

    Raises:
        OptionError: transformers rejects a value.
    """
    with _explained(config):
        return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(_used(config))


def _used(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {key: _used(value) for key, value in config.items() if key not in _NOT_USED}


def _class(settings: Any, config: Mapping[str, Any], layer: str) -> Any:
    """Returns the class of transformers, which ``AutoModel`` would build but for its projection."""
    name = _architecture(config)
    if name.endswith("VisionModelWithProjection") or (layer == "logits" and is_classifier(config)):
        found = getattr(transformers, name, None)
        if getattr(found, "config_class", None) is type(settings):
            return found
    return transformers.MODEL_MAPPING[type(settings)]


def _loaded(checkpoint: Checkpoint, layer: str, drop: tuple[str, ...] = ()) -> tuple[Any, set[str]]:
    """Returns a model, and the names of its tensors that the file lacks.

    Args:
        checkpoint: The weights.
        layer: The ``layer`` option.
        drop: The parts of the model that are not needed.

    Raises:
        OptionError: transformers cannot build the model.
        WeightsError: Tensors have another shape than the model's.
    """
    with quiet(), _explained(checkpoint.config):
        settings = _settings(checkpoint.config)
        model, found = _class(settings, checkpoint.config, layer).from_pretrained(
            None,
            config=settings,
            state_dict=load_file(checkpoint.file),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are checked below
            output_loading_info=True,
        )
    _check_no_more_layers(checkpoint, model, found["unexpected_keys"])
    for part in drop:
        if hasattr(model, part):
            setattr(model, part, None)
    tensors = {
        key
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not key.endswith(_UNUSED_TENSORS)
    }
    for key, theirs, ours in found["mismatched_keys"]:
        if key in tensors:
            raise WeightsError(
                f"the weights do not fit {checkpoint.name!r}: {key} has the shape {tuple(theirs)}, "
                f"by config.json {tuple(ours)}"
            )
    return model.eval().requires_grad_(False), tensors & {*found["missing_keys"]}


def _check_no_more_layers(checkpoint: Checkpoint, model: Any, unexpected: Iterable[str]) -> None:
    """Raises ``WeightsError`` if a file has more layers in a list than ``config.json`` says."""
    parts = model.named_modules()
    lengths = {name: len(part) for name, part in parts if isinstance(part, nn.ModuleList)}
    for key in sorted(unexpected):
        own = key.removeprefix(f"{model.base_model_prefix}.")
        for name, length in lengths.items():
            number = own.removeprefix(f"{name}.").partition(".")[0]
            if own.startswith(f"{name}.") and number.isdecimal() and int(number) >= length:
                raise WeightsError(
                    f"the weights do not fit {checkpoint.name!r}: by config.json, the model lacks "
                    f"{key} of its files"
                )


def _check_complete(checkpoint: Checkpoint, missing: set[str]) -> None:
    if missing:
        raise WeightsError(
            f"the weights do not fit {checkpoint.name!r}: {len(missing)} tensors of the model are "
            f"not in its files, for example {min(missing)}"
        )


def _interpolation(encoder: Any, example: torch.Tensor) -> dict[str, bool]:
    """Returns the arguments with which an encoder takes images of the example's size."""
    config = encoder.config
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    own = (size, size) if isinstance(size, int) else tuple(size or ())
    parameters = inspect.signature(encoder.forward).parameters
    if own in ((), tuple(example.shape[-2:])) or "interpolate_pos_encoding" not in parameters:
        return {}
    return {"interpolate_pos_encoding": True}


def _prefix_tokens(encoder: Any) -> dict[str, int]:
    """Returns the number of tokens of each kind that are before those of the image."""
    named = ((name.rpartition(".")[2], p) for name, p in encoder.named_parameters())
    return {n: p.shape[-2] if p.ndim > 1 else 1 for n, p in named if n in _PREFIX_TOKENS}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and reports of transformers."""
    logging: Any = transformers.utils.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(config: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except (ImageVecError, MemoryError):
        raise
    except Exception as error:  # configurations and models raise arbitrary exceptions
        raise OptionError(
            f"transformers cannot build a {config['model_type']!r} from this config.json: "
            f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"
        ) from error


@contextlib.contextmanager
def _runs_on(checkpoint: Checkpoint, example: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except (ImageVecError, MemoryError):
        raise
    except Exception as error:  # models raise arbitrary exceptions
        height, width = example.shape[-2:]
        raise OptionError(
            f"{checkpoint.name!r} cannot take images of {height}x{width}: "
            f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"
        ) from error
