"""Builds the image and text towers of open_clip models as modules that return features."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from torch import nn

from imagevec.errors import OptionError
from imagevec.models.state_dict import check_loaded, load_weights, no_random_init, seeded

_SMALL_TEXT = {"width": 8, "heads": 1, "layers": 1}


class Tower(nn.Module):
    """A part of a model that returns features ``(N, D)`` and has no classifier to remove."""

    returns_features = True

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.tower(inputs)
        features: torch.Tensor = output[0] if isinstance(output, tuple) else output  # CoCa: tokens
        return features


class CausalTextTower(Tower):
    """A causal text transformer that accepts tokens ``(N, L)`` for any L up to its context length.

    open_clip's ``forward`` only accepts the full context. A token does not depend on later tokens,
    so removing tokens after the last end token does not change the result.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        text: Any = self.tower
        length = inputs.shape[1]
        x = text.token_embedding(inputs) + text.positional_embedding[:length]  # (N, L, width)
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        ends = inputs.argmax(dim=-1)  # the end token has the highest number: (N,)
        x = text.ln_final(x)[torch.arange(x.shape[0], device=x.device), ends]  # (N, width)
        if isinstance(text.text_projection, nn.Linear):
            x = text.text_projection(x)
        elif text.text_projection is not None:
            x = x @ text.text_projection
        return cast(torch.Tensor, x)  # (N, D)


def image_tower(name: str, config: Mapping[str, Any], weights: Path | None) -> Tower:
    """Builds the module of ``encode_image``, float32 ``(N, 3, H, W)`` to ``(N, D)``.

    The arguments are those of ``model``.
    """
    if weights is None:  # the other parts do not matter
        config = {key: value for key, value in config.items() if key != "multimodal_cfg"}
        config["text_cfg"] = _SMALL_TEXT
    return Tower(model(name, config, weights).visual)  # type: ignore[arg-type]


def text_tower(
    name: str, config: Mapping[str, Any], weights: Path | None, reads_padding: bool
) -> Tower:
    """Builds the module of ``encode_text``, int32 ``(N, L)`` to ``(N, D)``.

    The first three arguments are those of ``model``; ``reads_padding`` is as in ``Tokenization``.
    """
    text = model(name, config, weights).text
    return (Tower if reads_padding else CausalTextTower)(text)  # type: ignore[arg-type]


def model(name: str, config: Mapping[str, Any], weights: Path | None) -> nn.Module:
    """Builds a model with both towers, like ``open_clip.create_model``.

    Args:
        name: The model's name, for error messages.
        config: open_clip's configuration of the model.
        weights: The weights file; ``None`` for random weights after ``torch.manual_seed(0)``.

    Raises:
        OptionError: The model cannot be built, for example without the package transformers.
        WeightsError: The file contains anything but tensors, or they belong to another model.
    """
    if weights is None:
        with seeded():
            return _built(name, config)
    with no_random_init():
        built = _built(name, config)
    convert = functools.partial(_converted, built)
    load_weights(built, weights, name, convert=convert, adds=False)
    check_loaded(built, built)
    return built


def _converted(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts the tensors of other formats than open_clip's, as ``open_clip.load_checkpoint``."""
    factory: Any = open_clip.factory
    tensors = factory.convert_state_dict(model, tensors)
    if "positional_embedding" in tensors:  # the text tower's names begin with "text." by now
        tensors = factory.convert_to_custom_text_state_dict(tensors)
    for name in ("logit_scale", "logit_bias"):  # a scalar, or one element
        if name in tensors and getattr(model, name, None) is not None:
            tensors[name] = tensors[name].reshape(getattr(model, name).shape)
    if model.logit_bias is not None:
        tensors.setdefault("logit_bias", torch.zeros_like(model.logit_bias))
    for name in ("input_resolution", "context_length", "vocab_size"):  # numbers of OpenAI's files
        tensors.pop(name, None)
    factory.resize_pos_embed(tensors, model)
    factory.resize_text_pos_embed(tensors, model)
    return tensors


def _built(name: str, config: Mapping[str, Any]) -> nn.Module:
    parts = {key: value for key, value in config.items() if key != "custom_text"}
    parts["vision_cfg"] = {**parts["vision_cfg"], "timm_model_pretrained": False}
    kind: Any = open_clip.CoCa if "multimodal_cfg" in parts else open_clip.CustomTextCLIP
    with _text_cfg(parts["text_cfg"]) as text_cfg:
        try:
            built: nn.Module = kind(**{**parts, "text_cfg": text_cfg})
        except Exception as error:  # no network for transformers' text tower, or a wrong key
            first = str(error).partition("\n")[0]
            raise OptionError(f"open_clip cannot build {name!r}: {first}") from error
    return built


@contextmanager
def _text_cfg(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a configuration of a text tower whose ``text_config`` is in a folder.

    ``open_clip.hf_model.HFTextEncoder`` reads the configuration of a model of transformers there.
    """
    text_cfg = {**config, "hf_model_pretrained": False}
    text_config = text_cfg.pop("text_config", None)
    with tempfile.TemporaryDirectory() as folder:
        if text_config is not None:
            (Path(folder) / "config.json").write_text(json.dumps(text_config))
            text_cfg["hf_model_name"] = folder
        yield text_cfg
