"""Models of Hugging Face's transformers, in folders or on the hub.

``model="transformers/<folder>"``, or the folder itself, is a folder that ``save_pretrained`` wrote:
``config.json``, ``preprocessor_config.json`` and ``model.safetensors``, which may be in shards.
``model="transformers/<owner>/<name>"`` is a repository of the hub, and
``"transformers/<owner>/<name>@<revision>"`` one revision of it. A repository that is in the hub's
cache is used as it is there, without a network. ``FeatureSpec.model`` contains the commit.

Nothing in a folder is run. Models whose code is in their folder (``auto_map``) are refused, and so
are pickled weights.

The ``"pooled"`` layer of images is the first that the model has of:

* the result of ``get_image_features`` (CLIP, SigLIP and other dual encoders), or ``image_embeds``
  (a vision model with its projection)
* ``"pooler"``: ``pooler_output``, unless its weights are not in the files, such as in those of a
  ViT's or DeiT's classifier. It is the class token of DINOv2 and DINOv3, the mean of Swin, ResNet
  and ConvNeXt, and the output of a trained head of SigLIP.
* ``"cls"``: the class token of ``last_hidden_state``
* ``"mean"``: the mean of ``last_hidden_state`` over the image, without class and register tokens

The other names are also layers, and several of them are computed in one forward pass. With
``layer="logits"``, a classifier returns its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec import cache
from imagevec.errors import MissingExtraError, OptionError, WeightsError, did_you_mean
from imagevec.files import expanded
from imagevec.models import hub, image_processors
from imagevec.models.source import ModelSource, Prepared
from imagevec.models.weights import check_is_weights, weights_file
from imagevec.options import RANDOM
from imagevec.spec import Preprocessing, Tokenization
from imagevec.texts.tokenize import encoder_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagevec.engines import Backend
    from imagevec.models.features import FeatureModel

PREFIX = "transformers/"

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
)
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_FROM_HUB = [_CONFIG, "preprocessor_config.json", "processor_config.json", *_TOKENIZER, *_WEIGHTS]
_FROM_HUB += ["model-*-of-*.safetensors"]

_LAYERS = ("pooled", "pooler", "cls", "mean", "logits")

_DUAL = (
    *("aimv2", "align", "altclip", "blip", "chinese_clip", "clip", "metaclip_2", "siglip"),
    "vision-text-dual-encoder",
)
# Text encoders whose tokens do not depend on later ones, such as the padding.
_CAUSAL = ("aimv2", "clip", "metaclip_2")
_IMAGE = (
    *("aimv2_vision_model", "beit", "bit", "chinese_clip_vision_model", "clip_vision_model"),
    *("convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2"),
    *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "efficientnet", "focalnet"),
    *("hiera", "ijepa", "levit", "mlcd", "mlcd_vision_model", "mobilenet_v1", "mobilenet_v2"),
    *("mobilevit", "mobilevitv2", "pixio", "poolformer", "pvt", "pvt_v2", "regnet", "resnet"),
    *("segformer", "siglip_vision_model", "swiftformer", "swin", "swinv2", "vit", "vit_msn"),
)

_WHY_NOT = {
    "siglip2": "keeps the aspect ratio of images (NaFlex): use one of a fixed resolution, whose "
    "model_type is 'siglip'",
    "siglip2_vision_model": "keeps the aspect ratio of images (NaFlex)",
    "vit_mae": "masks patches at random: save it as a ViT, with ViTModel.from_pretrained(...)"
    ".save_pretrained(...) of transformers",
    "timm_wrapper": "is a model of timm: use model='timm/local-dir:<folder>' or "
    "'timm/hf-hub:<owner>/<name>'",
}


def find(model: Any) -> TransformersSource | None:
    """Returns the source of a folder with ``config.json``, or of a name with the prefix.

    Whether the model exists is checked later.
    """
    if not isinstance(model, str | Path):
        return None
    if (expanded(model) / _CONFIG).is_file():
        return TransformersSource(Folder(expanded(model).absolute()))
    if not str(model).startswith(PREFIX) or isinstance(model, Path):
        return None
    name = model.removeprefix(PREFIX)
    hub_name = hub.NAME.fullmatch(name)
    if hub_name and ".." not in name and not expanded(name).is_dir():
        return TransformersSource(HubName(**hub_name.groupdict()))
    return TransformersSource(Folder(expanded(name).absolute()))


def names(part: str = "") -> list[str]:
    """Returns no names: those of the hub are not known here."""
    return []


def is_folder(model: str) -> bool:
    """Returns whether a ``model`` option is, or could be read as, a path of a folder."""
    source = find(model)
    return source is not None and isinstance(source.place, Folder)


@dataclass(frozen=True)
class Folder:
    """A local folder."""

    path: Path

    @property
    def name(self) -> str:
        """The value of ``FeatureSpec.model``."""
        return f"transformers:{self.path.name}"

    def found(self) -> Path | None:
        """Returns the folder if it has its files on this machine."""
        return self.path if (self.path / _CONFIG).is_file() else None

    def fetched(self) -> Path:
        """Returns the folder.

        Raises:
            OptionError: It is not a folder of transformers.
        """
        if not self.path.is_dir():
            raise OptionError(
                f"model='transformers/{self.path}': no such folder; a repository of the hub is "
                "'transformers/<owner>/<name>'"
            )
        if self.found() is None:
            raise OptionError(f"{self.path} has no {_CONFIG}, which says what its weights are")
        return self.path


@dataclass(frozen=True)
class HubName:
    """A repository of the Hugging Face hub.

    Attributes:
        repository: The owner and the name.
        revision: A commit, a tag or a branch; ``None`` is the main branch.
    """

    repository: str
    revision: str | None

    @property
    def name(self) -> str:
        """The value of ``FeatureSpec.model``: with the commit, once that is in the hub's cache."""
        folder = self.found()
        revision = folder.name if folder else self.revision
        return f"{PREFIX}{self.repository}" + (f"@{revision}" if revision else "")

    def found(self) -> Path | None:
        """Returns the folder if it has its files on this machine, in the hub's cache."""
        try:
            folder = self._snapshot(local_files_only=True)
        except (OSError, ValueError, MissingExtraError):  # not in the cache, or not a valid name
            return None
        return folder if (folder / _CONFIG).is_file() and _has_weights(folder) else None

    def fetched(self) -> Path:
        """Returns the folder in the hub's cache, and downloads it if it is not there.

        Raises:
            WeightsError: The download failed.
        """
        folder = self.found()
        if folder is not None:
            return folder
        try:
            return self._snapshot(allow_patterns=_FROM_HUB)
        except MissingExtraError:
            raise
        except Exception as error:  # the hub's client also raises those of its HTTP library
            first = str(error).strip().partition("\n")[0]
            raise WeightsError(
                f"cannot download {self.repository} ({type(error).__name__}: {first}). Downloads "
                "are stored in ~/.cache/huggingface, or in HF_HOME. Without a network, download "
                f"{_CONFIG}, {image_processors.CONFIG} and model.safetensors of "
                f"https://huggingface.co/{self.repository} on another machine, and use "
                "model='transformers/<folder>'"
            ) from error

    def _snapshot(self, **options: Any) -> Path:
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise MissingExtraError("transformers", "transformers") from error
        return Path(snapshot_download(self.repository, revision=self.revision, **options))


@dataclass(frozen=True)
class TransformersSource(ModelSource):
    """The image encoder of a folder or repository."""

    place: Folder | HubName

    libraries = ("torch", "transformers")
    infers_shapes = False
    contains_weights = True

    @property
    def name(self) -> str:
        return self.place.name

    def text_source(self) -> TransformersTextSource:
        source = TransformersTextSource(self.place)
        source.check("pooled")
        return source

    def check(self, layer: str | tuple[str, ...]) -> None:
        _check_model_type(self.name, self._config(), (*_IMAGE, *_DUAL))
        for name in layer if isinstance(layer, tuple) else (layer,):
            if name not in _LAYERS:
                raise OptionError(
                    f"layer={layer!r} is not valid for {self.name!r}: {did_you_mean(name, _LAYERS)}"
                )
        if isinstance(layer, tuple) and "logits" in layer:
            raise OptionError(f"layer={layer!r} is not valid: {self.name!r} takes 'logits' alone")

    def weights(self, option: str) -> Path | nn.Module | None:
        """Returns a file of the tensors and the configuration, as in ``pretrained``."""
        self._check_weights(option)
        if option == RANDOM:
            file: Path = _pretrained().save_random(self._config())
        else:
            tensors = _weights_of(self.place.fetched())
            check_is_weights(tensors)
            file = _pretrained().save(tensors, self._config())
        return file

    def _check_weights(self, option: str) -> None:
        if option not in ("DEFAULT", RANDOM):
            raise OptionError(
                f"weights={option!r} is not valid: {self.name!r} contains weights; for others, "
                f"use a folder that contains them and {_CONFIG}"
            )
        if option == "DEFAULT":
            _weights_of(self.place.fetched())

    def has_weights(self) -> bool:
        folder = self.place.found()
        return folder is not None and _has_weights(folder)

    def files(self, weights: str) -> list[Path]:
        folder = self.place.found()
        if folder is None:
            return []
        tensors = [] if weights == RANDOM else sorted(folder.glob("model*.safetensors*"))
        tokenizer = (folder / name for name in _TOKENIZER)
        described = [*image_processors.files(folder), *filter(Path.is_file, tokenizer)]
        return [folder / _CONFIG, *described, *tensors]

    def _has_own_weights(self, weights: str) -> bool:
        return False

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        if isinstance(self.place, Folder):
            raise OptionError(
                f"a featurizer with model={str(self.place.path)!r} cannot be saved, because it "
                "reads that folder: use the name of a repository of the hub, or imagevec.quantize"
            )
        return {"model": self.name}, {}  # with the commit

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        folder = self.place.fetched()
        return image_processors.read(folder, lambda: _processor_name(folder))

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        return preprocessing.with_input_size(input_size)

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        file = self.weights(RANDOM)
        assert isinstance(file, Path)
        return self.module(preprocessing, file)

    def module(
        self, preprocessing: Preprocessing | Tokenization, weights: Path | None
    ) -> nn.Module:
        assert weights is not None  # also random weights have a file
        checkpoint: nn.Module = _pretrained().Checkpoint(self.name, weights)
        return checkpoint

    def to_features(
        self,
        module: nn.Module,
        layer: str | tuple[str, ...],
        normalize: bool,
        example: Callable[[int], torch.Tensor],
    ) -> nn.Module:
        from imagevec.models.layers import FeatureModule

        tower = _pretrained().image_tower(module, layer, example(1))
        return FeatureModule(tower, "", layer, normalize).eval()

    def prepare(self, backend: Backend, model: FeatureModel) -> Prepared:
        """Fetches the files first, because the keys of prepared files depend on them."""
        self.check(model.layer)
        self._check_weights(model.weights)
        return super().prepare(backend, model)

    def _config(self) -> dict[str, Any]:
        """Returns the content of ``config.json``.

        Raises:
            OptionError: The model's code is in its folder, or the model is quantized.
            WeightsError: The file is damaged.
        """
        folder = self.place.fetched()
        config = hub.read_json(folder / _CONFIG)
        code = config.get("auto_map")
        if code:
            names = code.values() if isinstance(code, dict) else [code]
            raise OptionError(
                f"{self.name!r} needs the code in its folder (auto_map of {_CONFIG}: "
                f"{', '.join(map(str, names))}), which imagevec does not "
                "run: use a model that transformers contains, or a function that returns it"
            )
        if config.get("quantization_config"):
            raise OptionError(
                f"{self.name!r} has quantized weights (quantization_config of {_CONFIG}): use the "
                "original, with precision='bfloat16' or imagevec.quantize"
            )
        return config


@dataclass(frozen=True)
class TransformersTextSource(TransformersSource):
    """The text encoder of a dual encoder."""

    def check(self, layer: str | tuple[str, ...]) -> None:
        config = self._config()
        if config.get("model_type") in _IMAGE:
            raise OptionError(
                f"model={self.name!r} cannot encode text: it only has an image encoder; use a "
                "folder of CLIP or SigLIP with both"
            )
        _check_model_type(self.name, config, _DUAL)

    def preprocessing(  # type: ignore[override]
        self, weights_digest: str | None, weights: str = RANDOM
    ) -> Tokenization:
        """Returns the steps of the tokenizer, and stores its vocabulary in the cache.

        Texts are padded as in training: to the length of the model's context.

        Raises:
            OptionError: The tokenizer is not supported.
            WeightsError: The tokenizer cannot be loaded.
        """
        config = self._config()
        settings = _pretrained().text_settings(config)
        tokenizer = _tokenizer(self.place.fetched())
        highest = max(tokenizer.get_vocab().values())
        if highest >= settings.vocab_size:
            raise WeightsError(
                f"the tokenizer of {self.name!r} has tokens up to {highest}, its text encoder "
                f"{settings.vocab_size} tokens: they belong to different models"
            )
        if tokenizer.pad_token_id is None:
            raise WeightsError(f"the tokenizer of {self.name!r} has no pad_token for short texts")
        length = min(settings.max_position_embeddings, tokenizer.model_max_length)
        is_masked = "attention_mask" in tokenizer.model_input_names
        is_masked &= config["model_type"] not in _CAUSAL
        padding = tokenizer.pad_token_id + (settings.vocab_size if is_masked else 0)
        encoder = encoder_of(tokenizer, length, padding)
        with cache.temporary_folder() as temporary:
            encoder.save(str(temporary / "tokenizer.json"))
            stored = cache.store(temporary / "tokenizer.json", move=True)
        return Tokenization(
            vocabulary=stored.name,
            clean="none",
            words="",
            context_length=length,
            zeroed=None,
            reads_padding=True,
        )

    def to_features(
        self,
        module: nn.Module,
        layer: str | tuple[str, ...],
        normalize: bool,
        example: Callable[[int], torch.Tensor],
    ) -> nn.Module:
        from imagevec.models.layers import FeatureModule

        return FeatureModule(_pretrained().text_tower(module), "", layer, normalize).eval()


def _check_model_type(name: str, config: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises ``OptionError`` unless a configuration is that of a supported encoder."""
    kind = config.get("model_type")
    if kind in known:
        return
    if kind is None and "architecture" in config:
        kind = "timm_wrapper"
    if isinstance(kind, str) and kind in _WHY_NOT:
        raise OptionError(f"model={name!r} (model_type={kind!r}) {_WHY_NOT[kind]}")
    if kind is None:
        raise OptionError(
            f"model={name!r} is not a folder of transformers: {_CONFIG} has no model_type"
        )
    raise OptionError(
        f"model={name!r} has model_type={kind!r}, which is not supported: use a model whose "
        f"model_type is {', '.join(map(repr, sorted(known)))}"
    )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def _weights_of(folder: Path) -> Path:
    """Returns the safetensors file of a folder; shards are joined in the user's cache.

    Raises:
        WeightsError: There is none, or a shard is missing.
    """
    file, index = (folder / name for name in _WEIGHTS)
    if file.is_file():
        return file
    if index.is_file():
        return weights_file(str(index))
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder} contains an adapter (adapter_config.json), which changes the weights of a "
            "base model: merge the two, for example with peft's merge_and_unload, and save the "
            "result"
        )
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise WeightsError(
            f"{folder} has pickled weights ({pickled[0]}), which are not read: convert them with "
            "AutoModel.from_pretrained(folder).save_pretrained(folder) of transformers"
        )
    raise WeightsError(f"{folder} has no weights: {_WEIGHTS[0]}, or shards with {_WEIGHTS[1]}")


def _processor_name(folder: Path) -> str:
    """Returns the name of the class of an image processor whose file does not contain it."""
    _pretrained()
    from transformers import AutoImageProcessor

    loader: Any = AutoImageProcessor
    try:
        processor = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OptionError(f"the image processor of {folder} is not known: {error}") from error
    return type(processor).__name__


def _tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a folder, in the form of the package tokenizers.

    Raises:
        WeightsError: It cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    cure = "put its tokenizer.json and tokenizer_config.json there"
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise WeightsError(f"{folder} has no tokenizer: {cure}")  # some classes make an empty one
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _pretrained().quiet():
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
            except ImportError:  # SigLIP's needs sentencepiece, but not with a tokenizer.json
                tokenizer = None
            if not hasattr(tokenizer, "backend_tokenizer"):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
    except Exception as error:  # tokenizers raise arbitrary exceptions
        first = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"cannot load the tokenizer of {folder} ({type(error).__name__}: {first}): {cure}"
        ) from error
    return tokenizer


def _pretrained() -> Any:
    try:
        import transformers  # noqa: F401, not this module
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    from imagevec.models import pretrained

    return pretrained
