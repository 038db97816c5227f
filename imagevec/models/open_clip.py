"""open_clip models, named ``open_clip/<name>``, with comparable vectors of images and texts.

``open_clip/local-dir:<folder>`` and ``open_clip/hf-hub:<owner>/<name>`` have an
``open_clip_config.json`` and a file of weights, as ``open_clip.push_to_hf_hub`` writes them.

Both towers use the same weights file. Features of images are the result of ``encode_image``, those
of texts the result of ``encode_text``: the vectors after the projection, not normalised.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec import cache
from imagevec.errors import MissingExtraError, OptionError, WeightsError, did_you_mean
from imagevec.files import expanded
from imagevec.models import hub
from imagevec.models.source import ModelSource
from imagevec.models.weights import local_file
from imagevec.options import RANDOM, WEIGHTS_SUFFIXES, names_file
from imagevec.spec import Preprocessing, Tokenization, height_and_width
from imagevec.texts.tokenize import encoder_of

if TYPE_CHECKING:
    from torch import nn

PREFIX = "open_clip/"

# Files next to the weights in a model's repository on the Hugging Face hub. If they are next to a
# local weights file, they define its preprocessing and tokenization.
_CONFIG = "open_clip_config.json"
_TOKENIZER = "tokenizer.json"

# As in open_clip.factory; "config.json" is that of a text tower of transformers.
_WEIGHTS: tuple[str, ...] = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_WEIGHTS += ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
_WEIGHTS += ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_TEXT_CONFIG = "config.json"
_TOKENIZERS = (_TOKENIZER, "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_DEFAULTS = {  # from open_clip.transform.PreprocessCfg
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
_IMAGE_SIZE = 224  # from open_clip.model.CLIPVisionCfg
_PATCH_SIZE = 16  # from open_clip.model.CLIPVisionCfg
_CONTEXT_LENGTH = 77  # from open_clip.model.CLIPTextCfg


def find(model: Any) -> OpenClipSource | None:
    """Returns the source of a name with the prefix. Whether it exists is checked later."""
    if not isinstance(model, str) or not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    repository = hub.find(name, PREFIX)
    return OpenClipSource(name) if repository is None else _of_repository(repository)


def names(part: str = "") -> list[str]:
    """Returns the names that contain ``part``, or none if open_clip is not installed."""
    try:
        listed = _open_clip().list_models()
    except MissingExtraError:
        return []
    return [PREFIX + name for name in listed if part.casefold() in name.casefold()]


@dataclass(frozen=True)
class OpenClipSource(ModelSource):
    """The image tower of an open_clip model.

    Attributes:
        clip_name: The name without the prefix.
        repository: The files of a model whose configuration is not open_clip's own. Workers do not
            need them.
        config: Its ``open_clip_config.json``, with the configuration of a text tower of
            transformers as ``text_config``.
    """

    clip_name: str
    repository: hub.Repository | None = None
    config: str = ""

    libraries = ("torch", "timm", "open_clip_torch")
    beside_weights = (_CONFIG, _TOKENIZER, "tokenizer_config.json")

    @property
    def name(self) -> str:
        return self.repository.name if self.repository else PREFIX + self.clip_name

    @property
    def config_digest(self) -> str:
        if not self.config:
            return ""
        return hashlib.sha256(json.dumps(self._config, sort_keys=True).encode()).hexdigest()

    def text_source(self) -> OpenClipTextSource:
        return OpenClipTextSource(self.clip_name, self.repository, self.config)

    def has_weights(self) -> bool:
        return self.repository is not None and self.repository.kind == "local-dir"

    def files(self, weights: str) -> list[Path]:
        if self.repository is None:
            return super().files(weights)
        own = [self._weights_file] if weights in ("", "DEFAULT") else super().files(weights)
        config = self.repository.first((_CONFIG,))
        beside = [config]
        if self.repository.kind == "local-dir":
            beside += map(config.with_name, (_TEXT_CONFIG, *_TOKENIZERS))
        return [*own, *filter(Path.is_file, beside)]

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        if self.repository is not None:
            return self.repository.to_save(weights, own)
        return super().to_save(weights, own)

    def check(self, layer: str | tuple[str, ...]) -> None:
        _ = self._config
        if layer != "pooled":
            raise OptionError(
                f"layer={layer!r} is not valid: open_clip models only support 'pooled', the "
                "projection"
            )

    def weights(self, option: str) -> Path | nn.Module | None:
        if self.repository is not None and option == "DEFAULT":
            return self._weights_file
        if self.repository is not None or option == RANDOM or names_file(option):
            return local_file(self.name, option)
        return _downloaded(self.name, self._tag(option))

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        """Returns the preprocessing of the tag, or of the configuration next to a weights file.

        Random weights and files without a configuration use that of the first tag that fits.
        """
        wanted = {**_DEFAULTS, **self._preprocess_cfg(weights)}
        size = self._config["vision_cfg"].get("image_size", _IMAGE_SIZE)
        if wanted["resize_mode"] not in ("shortest", "squash") or not isinstance(size, int):
            raise OptionError(
                f"the preprocessing of {self.name!r} is not supported (image_size={size}, "
                f"resize_mode={wanted['resize_mode']!r}): only models with a square input and a "
                "resize_mode of 'shortest' or 'squash' are"
            )
        return Preprocessing(
            resize_size=size,
            crop_size=size,
            mean=tuple(wanted["mean"]),
            std=tuple(wanted["std"]),
            interpolation=wanted["interpolation"],
            squash=wanted["resize_mode"] == "squash",
        )

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        """Follows ``image_transform`` of ``open_clip/transform.py``."""
        vision_cfg = self._config["vision_cfg"]
        patch = vision_cfg.get("patch_size") or _PATCH_SIZE
        grids = (preprocessing.input_shape, height_and_width(input_size))
        own, new = ((height // patch, width // patch) for height, width in grids)
        is_mistaken = own != new and math.prod(own) == math.prod(new)  # for the model's own grid
        if "timm_model_name" not in vision_cfg and (
            is_mistaken or isinstance(vision_cfg.get("layers"), list)
        ):
            raise OptionError(
                f"input_size={input_size!r} is not valid: open_clip cannot resize the position "
                f"embeddings of {self.name!r} for it; its own size is {preprocessing.input_size}"
            )
        resized = preprocessing.with_input_size(input_size)
        if preprocessing.squash or isinstance(input_size, int):
            return resized
        return dataclasses.replace(resized, interpolation="bicubic")  # whatever the tag's is

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        return self.module(preprocessing, None)

    def module(
        self, preprocessing: Preprocessing | Tokenization, weights: Path | None
    ) -> nn.Module:
        from imagevec.models.towers import image_tower

        size = preprocessing.input_size
        vision_cfg = self._config["vision_cfg"]
        config = {**self._config, "vision_cfg": {**vision_cfg, "image_size": size}}
        tower = image_tower(self.name, config, weights)
        if "timm_model_name" in vision_cfg and size != vision_cfg.get("image_size", _IMAGE_SIZE):
            # as in open_clip.create_model with force_image_size; CNNs have nothing to resize
            timm_model: Any = tower.tower
            timm_model.set_input_size(size)
        return tower

    @property
    def _weights_file(self) -> Path:
        assert self.repository is not None
        return self.repository.first(_WEIGHTS)

    @property
    def _config(self) -> dict[str, Any]:
        """open_clip's configuration of the model.

        Raises:
            OptionError: open_clip has no such model.
        """
        config: dict[str, Any] | None = None
        if self.config:
            config = json.loads(self.config)["model_cfg"]
        elif ":" not in self.clip_name:  # open_clip would read other places: hf-hub:, local-dir:
            config = _open_clip().get_model_config(self.clip_name)
        if config is None:
            known = (PREFIX + name for name in _open_clip().list_models())
            raise OptionError(f"model={self.name!r} is not known: {did_you_mean(self.name, known)}")
        return config

    def _preprocess_cfg(self, weights: str) -> Mapping[str, Any]:
        config = _beside(weights, _CONFIG)
        if config is not None:
            return hub.read_json(config).get("preprocess_cfg") or {}
        if self.config:
            return json.loads(self.config).get("preprocess_cfg") or {}
        tags = self._tags()
        return tags.get(weights) or next(iter({**self._fitting(tags), **tags}.values()), {})

    def _tags(self) -> dict[str, dict[str, Any]]:
        """Returns open_clip's configuration of each pretrained tag."""
        pretrained = _open_clip().pretrained
        tags = _open_clip().list_pretrained_tags_by_model(self.clip_name)
        return {tag: pretrained.get_pretrained_cfg(self.clip_name, tag) for tag in tags}

    def _tag(self, option: str) -> dict[str, Any]:
        """Returns open_clip's configuration of a tag; ``"DEFAULT"`` requires a single tag.

        Raises:
            OptionError: The tag does not exist, or its weights belong to another model.
        """
        tags = self._tags()
        fitting = self._fitting(tags)
        if option == "DEFAULT" and len(fitting) == 1:
            return next(iter(fitting.values()))
        if option not in tags:
            near = f"choose one of {', '.join(fitting)}"
            if option != "DEFAULT" and fitting:
                near = did_you_mean(option, [*fitting, RANDOM])
            elif not fitting:
                near = "open_clip has none"
            raise OptionError(
                f"weights={option!r} is not known for {self.name!r}: {near}; "
                f"or use a path that ends in {', '.join(WEIGHTS_SUFFIXES)}"
            )
        if option not in fitting:
            raise OptionError(
                f"weights={option!r} were trained with QuickGELU: use model='{self.name}-quickgelu'"
            )
        return tags[option]

    def _fitting(self, tags: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns the tags whose weights belong to this model, not to its quickgelu variant."""
        has_twin = f"{self.clip_name}-quickgelu" in _open_clip().list_models()
        return {tag: tags[tag] for tag in tags if not (tags[tag].get("quick_gelu") and has_twin)}


@dataclass(frozen=True)
class OpenClipTextSource(OpenClipSource):
    """The text tower of an open_clip model."""

    @property
    def infers_shapes(self) -> bool:  # type: ignore[override]
        return not self._config["text_cfg"].get("hf_model_name")  # its code depends on the padding

    def preprocessing(  # type: ignore[override]
        self, weights_digest: str | None, weights: str = RANDOM
    ) -> Tokenization:
        """Returns the steps of the model's tokenizer, and stores its vocabulary in the cache.

        Raises:
            OptionError: open_clip has no tokenizer for the model, or it is not supported.
            WeightsError: The vocabulary cannot be loaded.
        """
        text_cfg = self._config["text_cfg"]
        options = dict(text_cfg.get("tokenizer_kwargs") or {})
        context_length = text_cfg.get("context_length", _CONTEXT_LENGTH)
        if options.keys() - {"clean", "strip_sep_token"} or text_cfg.get("tokenizer_mode"):
            raise OptionError(f"the tokenizer of {self.name!r} is not supported: {text_cfg}")
        zeroed = None
        if text_cfg.get("hf_tokenizer_name"):
            tokenizer = _of_transformers(self.name, self._tokenizer(weights))
            encoder = encoder_of(tokenizer, context_length, tokenizer.pad_token_id)
            words, clean = "", "whitespace"
            if options.get("strip_sep_token"):
                zeroed = tokenizer.sep_token_id
        else:
            simple = _open_clip().SimpleTokenizer(context_length=context_length)
            encoder = _of_byte_pairs(simple)
            words, clean = simple.pat.pattern, "lower"
        with cache.temporary_folder() as folder:
            encoder.save(str(folder / "tokenizer.json"))
            stored = cache.store(folder / "tokenizer.json", move=True)
        return Tokenization(
            vocabulary=stored.name,
            clean=options.get("clean", clean),
            words=words,
            context_length=context_length,
            zeroed=zeroed,
            reads_padding=self._reads_padding,
        )

    def module(
        self, preprocessing: Preprocessing | Tokenization, weights: Path | None
    ) -> nn.Module:
        from imagevec.models.towers import text_tower

        return text_tower(self.name, self._config, weights, self._reads_padding)

    def _tokenizer(self, weights: str) -> str:
        """Returns the folder or the name on the hub of a tokenizer of transformers."""
        vocabulary = _beside(weights, _TOKENIZER)
        if vocabulary is None and self.repository is not None:
            is_local = self.repository.kind == "local-dir"
            vocabulary = self.repository.find(_TOKENIZERS) if is_local else None
        name: str = self._config["text_cfg"]["hf_tokenizer_name"]
        return name if vocabulary is None else str(vocabulary.parent)

    @property
    def _reads_padding(self) -> bool:
        """Whether the vector of a text depends on the tokens after its end.

        It does not if attention is causal and the output is taken at the end token.
        """
        text_cfg = self._config["text_cfg"]
        is_causal = not (text_cfg.get("no_causal_mask") or text_cfg.get("hf_model_name"))
        takes_end = text_cfg.get("pool_type", "argmax") == "argmax" and "embed_cls" not in text_cfg
        return not (is_causal and takes_end)


def _of_repository(repository: hub.Repository) -> OpenClipSource:
    """Reads the configuration.

    Raises:
        OptionError: It names files or models elsewhere.
        WeightsError: There is none, or it is not open_clip's.
    """
    content = repository.json(_CONFIG)
    model_cfg: dict[str, Any] = content.get("model_cfg") or {}
    parts = ("vision_cfg", "text_cfg")
    has_parts = isinstance(model_cfg, dict) and all(
        isinstance(model_cfg.get(part), dict) for part in parts
    )
    if not has_parts or "embed_dim" not in model_cfg:
        raise WeightsError(
            f"{_CONFIG} of {repository.where} is not open_clip's: it has no 'model_cfg' with "
            "'embed_dim', 'vision_cfg' and 'text_cfg'"
        )
    text_cfg = model_cfg["text_cfg"]
    timm_name = model_cfg["vision_cfg"].get("timm_model_name")
    hub_names = [text_cfg.get(key) for key in ("hf_model_name", "hf_tokenizer_name")]
    is_elsewhere = any(name and not _HUB_NAME.fullmatch(str(name)) for name in hub_names)
    if is_elsewhere or (timm_name and not re.fullmatch(r"[\w.-]+", str(timm_name))):
        named = ", ".join(map(repr, filter(None, [timm_name, *hub_names])))
        raise OptionError(f"{_CONFIG} of {repository.where} is not valid: it names paths ({named})")
    kept = {"model_cfg": model_cfg, "preprocess_cfg": content.get("preprocess_cfg")}
    text_cfg.pop("text_config", None)
    if text_cfg.get("hf_model_name"):
        text_cfg["text_config"] = _text_config(repository, text_cfg["hf_model_name"])
    return OpenClipSource(str(repository), repository, json.dumps(kept, sort_keys=True))


def _text_config(repository: hub.Repository, name: str) -> dict[str, Any]:
    """Returns the configuration of a text tower of transformers.

    Args:
        repository: The model's files, which may contain it.
        name: The text tower's name on the hub.

    Raises:
        OptionError: It needs code of its own.
        WeightsError: It cannot be found.
    """
    found = repository.find((_TEXT_CONFIG,)) if repository.kind == "local-dir" else None
    place = repository if found else hub.Repository("open_clip", "hf-hub", name)
    try:
        config = place.json(_TEXT_CONFIG)
    except WeightsError as error:
        raise WeightsError(
            f"the text tower of {repository.where} is {name!r} of transformers, and its "
            f"configuration is missing: put {_TEXT_CONFIG} of {name} next to {_CONFIG} in the "
            "folder"
        ) from error
    if "auto_map" in config or "model_type" not in config:
        raise OptionError(
            f"{_TEXT_CONFIG} of {place.where} is not supported: it needs code that is not in "
            "transformers (auto_map), or has no model_type"
        )
    return config


def _beside(weights: str, name: str) -> Path | None:
    """Returns the file with this name next to a weights file, or ``None``."""
    path = expanded(weights).with_name(name)
    return path if names_file(weights) and path.is_file() else None


def _downloaded(name: str, tag: Mapping[str, Any]) -> Path:
    """Returns the weights of a tag in the Hugging Face hub's cache or in ``~/.cache/clip``."""
    try:
        return Path(_open_clip().download_pretrained(tag))
    except (OSError, RuntimeError) as error:  # raised by open_clip without a network
        repository = tag["hf_hub"].rpartition("/")[0] or tag["url"]
        raise WeightsError(
            f"cannot download the weights of {name} ({error}). Downloads are stored in ~/.cache, "
            f"or in XDG_CACHE_HOME. Without a network, download {repository} on another "
            f"machine, with its {_CONFIG} and {_TOKENIZER} if present, "
            "and use weights='<folder>/<file>', or weights='random' for tests"
        ) from error


def _of_byte_pairs(simple: Any) -> Any:
    """Converts an ``open_clip.SimpleTokenizer`` to a ``tokenizers.Tokenizer`` of words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    start, end = (simple.decoder[token] for token in (simple.sot_token_id, simple.eot_token_id))
    pairs = list(simple.bpe_ranks)
    encoder = Tokenizer(models.BPE(simple.encoder, pairs, end_of_word_suffix="</w>"))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.add_special_tokens([AddedToken(token, normalized=False) for token in (start, end)])
    encoder.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, simple.sot_token_id), (end, simple.eot_token_id)],
    )
    encoder.enable_truncation(simple.context_length)
    encoder.enable_padding(length=simple.context_length, pad_id=0, pad_token=simple.decoder[0])
    return encoder


def _of_transformers(name: str, where: str) -> Any:
    """Loads a tokenizer from the Hugging Face hub or from a folder.

    Raises:
        WeightsError: The tokenizer cannot be loaded.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "clip") from error
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as error:  # raised by transformers without a network
        first = str(error).partition("\n")[0]
        raise WeightsError(
            f"cannot load the tokenizer of {name}, {where} ({first}). Without a network, put its "
            f"{_TOKENIZER} and tokenizer_config.json next to the weights and use weights='<path>'"
        ) from error


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip", "clip") from error
    return open_clip
