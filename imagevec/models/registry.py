"""The registry: a name to a model that yields feature vectors, and the facts that go with it.

torchvision's classification models are known by their torchvision names, timm's as
``timm/<name>``, one's own through ``register_model``. Preprocessing travels with the weights:
torchvision's preset of the weights entry, timm's data config, or what was registered.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision.models
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from imagevec.errors import MissingExtraError, OptionError, WeightsError, did_you_mean
from imagevec.models import exported
from imagevec.pickling import check_pickle
from imagevec.spec import Preprocessing

TIMM_PREFIX = "timm/"

ModelFactory = Callable[[], nn.Module]

_IMAGENET = Preprocessing()


class Entry(Protocol):
    """One model: how to build it, and how its images are prepared."""

    @property
    def name(self) -> str:
        """What ``FeatureSpec.model`` holds."""

    def build(self, crop_size: int) -> nn.Module:
        """A new classifier for ``(N, 3, crop_size, crop_size)``, in no particular mode."""

    def preprocessing(self, weights_digest: str | None) -> Preprocessing:
        """What the weights were trained for; they are known by their SHA-256."""


@dataclass(frozen=True)
class TorchvisionEntry:
    """A model of ``torchvision.models``."""

    name: str

    @property
    def weights_enum(self) -> Any:
        """The enumeration of the pretrained weights, with their presets and addresses."""
        return torchvision.models.get_model_weights(self.name)

    def build(self, crop_size: int) -> nn.Module:
        kwargs: dict[str, Any] = {}
        if self.name in ("googlenet", "inception_v3"):
            # What torchvision sets where it loads its weights, which expect another input scale.
            kwargs = {"transform_input": True, "init_weights": False}
        elif self.name.startswith("vit_"):
            kwargs = {"image_size": crop_size}
        model: nn.Module = torchvision.models.get_model(self.name, weights=None, **kwargs)
        return model

    def preprocessing(self, weights_digest: str | None) -> Preprocessing:
        """The preset of the weights entry (``torchvision/transforms/_presets.py``).

        Weights that are not torchvision's, and random ones, take the preset of the default entry.
        """
        weights = self.weights_enum.DEFAULT
        for candidate in self.weights_enum:
            # The name of a file of torch.hub ends in the first digits of its SHA-256.
            if weights_digest and weights_digest.startswith(
                Path(candidate.url).stem.split("-")[-1]
            ):
                weights = candidate
        preset = weights.transforms()
        return Preprocessing(
            resize_size=preset.resize_size[0],
            crop_size=preset.crop_size[0],
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation.value,
        )


@dataclass(frozen=True)
class TimmEntry:
    """A model of timm; ``timm_name`` has no prefix."""

    timm_name: str

    @property
    def name(self) -> str:
        return TIMM_PREFIX + self.timm_name

    def build(self, crop_size: int, pretrained: bool = False) -> nn.Module:
        del crop_size  # the one that timm's data config states
        model: nn.Module = _timm().create_model(self.timm_name, pretrained=pretrained)
        return model

    def preprocessing(self, weights_digest: str | None) -> Preprocessing:
        """timm's data config (``timm/data/config.py``, ``timm/data/transforms_factory.py``)."""
        del weights_digest
        pretrained_cfg = _timm().get_pretrained_cfg(self.timm_name).to_dict()
        config = _timm().data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        _, height, width = config["input_size"]
        if height != width or config["crop_mode"] not in ("center", "squash"):
            raise OptionError(
                f"the data config of {self.name!r} is not supported ({config}): only models with "
                "a square input and a crop_mode of 'center' or 'squash' are"
            )
        return Preprocessing(
            resize_size=math.floor(height / config["crop_pct"]),
            crop_size=height,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            squash=config["crop_mode"] == "squash",
        )


@dataclass(frozen=True)
class FactoryEntry:
    """A zero-argument factory, registered under a name or given directly."""

    factory: ModelFactory
    preset: Preprocessing = _IMAGENET
    registered_name: str | None = None

    @property
    def name(self) -> str:
        if self.registered_name:
            return self.registered_name
        qualname = getattr(self.factory, "__qualname__", type(self.factory).__qualname__)
        return f"factory:{self.factory.__module__}.{qualname}"

    def build(self, crop_size: int) -> nn.Module:
        del crop_size  # the factory knows
        model = self.factory()
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"the factory of {self.name!r} is not valid: "
                f"it returned {type(model).__name__}, not a torch.nn.Module"
            )
        return model

    def preprocessing(self, weights_digest: str | None) -> Preprocessing:
        del weights_digest
        return self.preset


@dataclass(frozen=True)
class ExportedEntry:
    """A file of ``torch.export.save``: see ``imagevec.models.exported``."""

    path: Path
    preset: Preprocessing | None = None
    registered_name: str | None = None

    @property
    def name(self) -> str:
        return self.registered_name or f"pt2:{self.path.stem}"

    def build(self, crop_size: int) -> nn.Module:
        """The program, which yields features already."""
        del crop_size  # the program knows
        return exported.load(self.path)

    def preprocessing(self, weights_digest: str | None) -> Preprocessing:
        """What was registered, else torchvision's preset for the program's input size."""
        del weights_digest
        size = exported.input_size(self.path)
        if self.preset is None:
            crop_size = size or _IMAGENET.crop_size
            # 256 to 224, as torchvision's
            return Preprocessing(resize_size=math.floor(crop_size / 0.875), crop_size=crop_size)
        if size not in (None, self.preset.crop_size):
            raise OptionError(
                f"crop_size={self.preset.crop_size} is not valid: {self.path.name} takes {size}"
            )
        return self.preset


_registered: dict[str, FactoryEntry | ExportedEntry] = {}


def list_models() -> list[str]:
    """The names that ``model`` accepts, sorted; any ``"timm/<name>"`` is accepted too."""
    return sorted([*_registered, *torchvision.models.list_models(module=torchvision.models)])


def register_model(
    name: str, factory: ModelFactory | str | Path, *, preprocessing: Preprocessing | None = None
) -> None:
    """Makes ``model=name`` mean ``factory``, in this process and in the jobs that it starts.

    Args:
        name: A new name.
        factory: Returns a new ``nn.Module`` that takes float32 ``(N, 3, S, S)``. It is pickled
            (by cloudpickle) and called once on the driver and once in each worker process. Or the
            path of a ``.pt2`` file, whose loading can run code: see ``imagevec.models.exported``.
        preprocessing: What happens to the pixels before the model; by default that of
            torchvision's ``ImageClassification`` preset, for a ``.pt2`` file in its input size.

    Raises:
        OptionError: The name is taken, the factory is not callable, or there is no such file.
        SerializationError: The factory captures what must not be pickled, a session for example.
    """
    if name in list_models() or name.startswith(TIMM_PREFIX):
        raise OptionError(f"the model name {name!r} is taken: choose another")
    if exported.is_exported(factory):
        _registered[name] = ExportedEntry(_existing(factory), preprocessing, name)
        return
    if not callable(factory):
        raise OptionError(f"factory={factory!r} is not valid: give a function without arguments")
    check_pickle(factory)
    _registered[name] = FactoryEntry(factory, preprocessing or _IMAGENET, name)


def find_entry(
    model: str | ModelFactory,
) -> TorchvisionEntry | TimmEntry | FactoryEntry | ExportedEntry:
    """The entry of a ``model`` option.

    Raises:
        OptionError: The name is unknown; the message holds the nearest ones.
        MissingExtraError: A ``timm/`` name without timm.
        SerializationError: The factory captures what must not be pickled, a session for example.
    """
    if isinstance(model, nn.Module):
        raise OptionError(
            "model is a live nn.Module, which would be pickled into every task: "
            "give a zero-argument factory, a function that returns it"
        )
    if callable(model):
        check_pickle(model)
        return FactoryEntry(model)
    if model in _registered:
        return _registered[model]
    if exported.is_exported(model):
        return ExportedEntry(_existing(model))
    if not isinstance(model, str):
        raise OptionError(f"model={model!r} is not valid: give a name or a zero-argument factory")
    if model.startswith(TIMM_PREFIX):
        name = model.removeprefix(TIMM_PREFIX)
        architecture, _, tag = name.partition(".")
        tagged = [known for known in _timm().list_pretrained() if known.startswith(architecture)]
        if not _timm().is_model(architecture) or (tag and name not in tagged):
            known_names = tagged if _timm().is_model(architecture) else _timm().list_models()
            near = did_you_mean(model, (TIMM_PREFIX + known for known in known_names))
            raise OptionError(f"model={model!r} is not known: {near}")
        return TimmEntry(name)
    if model not in list_models():
        raise OptionError(f"model={model!r} is not known: {did_you_mean(model, list_models())}")
    return TorchvisionEntry(model)


def _existing(path: Any) -> Path:
    absolute = Path(path).expanduser().absolute()
    if not absolute.is_file():
        raise OptionError(f"model={str(path)!r}: there is no such file")
    return absolute


def to_feature_model(model: nn.Module, layer: str | tuple[str, ...], normalize: bool) -> nn.Module:
    """Turns a classifier, which it alters, into a model that yields feature vectors.

    Returns:
        A module in evaluation mode, float32 ``(N, 3, S, S)`` to ``(N, D)``. The vectors of several
        layers, each normalised by itself, are one after the other: D is the sum of their lengths.

    Raises:
        OptionError: The model has no such layer; the message holds the nearest ones.
    """
    model.eval().requires_grad_(False)
    if layer == "pooled":
        model = _without_classifier(model)
    elif layer != "logits":
        return _up_to_nodes(model, layer if isinstance(layer, tuple) else (layer,), normalize)
    return nn.Sequential(model, _VectorNorm()).eval() if normalize else model


def infer_num_features(
    feature_model: nn.Module, crop_size: int, device: str = "meta"
) -> tuple[int, ...]:
    """The length of the feature vector, or of each of several layers' vectors.

    On PyTorch's ``meta`` device only shapes are computed, and the model is of no use afterwards.

    Raises:
        OptionError: The model's output is not a tensor of two dimensions.
    """
    feature_model.to(device)
    with torch.device(device), torch.inference_mode():
        image = torch.zeros(1, 3, crop_size, crop_size)
        if isinstance(feature_model, _Layers):
            outputs = feature_model.vectors(image)
        else:
            outputs = [feature_model(image)]
    for output in outputs:
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output)
            raise OptionError(f"the model's output is not valid: {shape}, not a tensor (N, D)")
    return tuple(output.shape[1] for output in outputs)


def build_model(entry: Entry, crop_size: int, state_dict: dict[str, Any] | None) -> nn.Module:
    """A classifier with its weights.

    Args:
        entry: The model's registry entry.
        crop_size: The side of its input, in pixels.
        state_dict: The weights; ``None`` for random ones, the same wherever they are drawn.

    Raises:
        WeightsError: The weights are of another model.
    """
    if state_dict is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return entry.build(crop_size)
    with no_random_init():
        model = entry.build(crop_size)
    if isinstance(model, torchvision.models.DenseNet):
        # torchvision's files have the names of its first version: norm.1 is norm1 now.
        state_dict = {
            re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key): value
            for key, value in state_dict.items()
        }
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise WeightsError(
            f"the weights do not fit {entry.name!r}: {' '.join(' '.join(lines[1:4]).split())[:500]}"
        ) from error
    return model


class no_random_init(TorchFunctionMode):  # noqa: N801, a context manager
    """Modules built within start from zeros: the random numbers take most of the time of building.

    Zeros are drawn, not nothing: ``nn.init.trunc_normal_`` draws again until all are in its range.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


class _VectorNorm(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.float(), dim=1)  # (N, D) -> (N, D)


class _Whole(nn.Module):
    """A model whose output is a node of its own, ``output``; all others begin with ``model.``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.output(self.model(images))
        return output


class _Layers(nn.Module):
    """Layers of a model, each a vector.

    Attributes:
        extractor: ``(N, 3, S, S)`` to a dictionary of vectors, ``(N, D)`` each.
        names: In that dictionary, in order.
        norm: What becomes of each vector.
    """

    def __init__(self, extractor: nn.Module, names: list[str], normalize: bool) -> None:
        super().__init__()
        self.extractor = extractor
        self.names = names
        self.norm = _VectorNorm() if normalize else nn.Identity()

    def vectors(self, images: torch.Tensor) -> list[torch.Tensor]:
        """``(N, D)`` of each layer."""
        vectors = self.extractor(images)
        return [self.norm(vectors[name]) for name in self.names]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.vectors(images), dim=1)  # (N, D) each -> (N, sum of D)


def _to_vector(node: torch.Tensor, first_token: int | None, patches: int | None) -> torch.Tensor:
    """A node's output as a vector in memory of its own.

    Args:
        node: ``(N, C)``, ``(N, T, C)``, ``(N, C, H, W)`` or ``(N, H, W, C)``. Images are square, so
            the positions are the two dimensions of the same length.
        first_token: Of the tokens to be averaged; ``None`` takes the class token.
        patches: So many tokens are those of the image alone, and all of them are averaged.
    """
    if not isinstance(node, torch.Tensor):
        kind = type(node).__name__
        raise OptionError(f"the layer's output is not a tensor but of type {kind}: choose another")
    if node.ndim == 4:
        channels_last = node.shape[1] == node.shape[2] != node.shape[3]
        return node.mean((1, 2) if channels_last else (2, 3))
    if node.ndim != 3:
        return node.clone()
    if node.shape[1] == patches:
        return node.mean(1)
    return node[:, 0].clone() if first_token is None else node[:, first_token:].mean(1)


def _first_token(model: nn.Module) -> int | None:
    """Where a model of timm has no class token: which token is the first of the image."""
    is_timm = hasattr(model, "reset_classifier")
    if not is_timm or getattr(model, "cls_token", None) is not None:
        return None
    return getattr(model, "num_prefix_tokens", 0)


def _without_classifier(model: nn.Module) -> nn.Module:
    """The model up to the input of its classifier's last linear layer."""
    if hasattr(model, "reset_classifier"):  # timm
        model.reset_classifier(0)  # type: ignore[operator]
    elif isinstance(model, torchvision.models.SqueezeNet):  # its classifier is a convolution
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)))
    else:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if linear:  # a factory may give a backbone that has no classifier
            parent, _, name = linear[-1].rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    result: nn.Module = model
    return result


def _up_to_nodes(model: nn.Module, layers: tuple[str, ...], normalize: bool) -> nn.Module:
    """The model up to the layers, which one forward pass computes."""
    special = {"logits": "output"}
    if "pooled" in layers:
        special["pooled"] = _mark_pooled(model)
    whole = _Whole(model).eval()
    try:
        _, nodes = get_graph_node_names(whole, _not_to_trace(), suppress_diff_warning=True)
    except Exception as error:  # a model's own code runs under torch.fx's tracer
        layer = layers[0] if len(layers) == 1 else layers
        raise OptionError(
            f"layer={layer!r} is not available: torch.fx cannot trace the model ({error}); "
            "use 'pooled' or 'logits' alone, or a factory whose model ends at that layer"
        ) from error
    # A module's name means the last node in it. torchvision finds that, too, but of two names that
    # mean the same node it gives another one to the second.
    last = {prefix: node for node in nodes for prefix in _prefixes(node)}
    known = {name.removeprefix("model."): node for name, node in last.items() if "." in name}
    known |= {layer: last[name] for layer, name in special.items() if name in last}
    for layer in layers:
        if layer not in known:
            near = did_you_mean(layer, {*known, "pooled", "logits"} - {layer})
            raise OptionError(f"layer={layer!r} is not known: {near}")
    names = [known[layer] for layer in layers]
    extractor = create_feature_extractor(
        whole, names, tracer_kwargs=_not_to_trace(), suppress_diff_warning=True
    )
    graph = extractor.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)  # timm
    pooling = (_first_token(model), patches)
    vectors = {}
    for name, node in output.args[0].items():
        # Not at the end: an in-place operation that comes next would write over the node's output.
        with graph.inserting_after(node):
            vectors[name] = graph.call_function(_to_vector, (node, *pooling))
    output.args = (vectors,)
    return _Layers(fx.GraphModule(whole, graph), names, normalize).eval()


def _not_to_trace() -> dict[str, Any]:
    """What ``torch.fx`` takes as a whole: parts of timm's models that depend on an input's shape.

    They are those of ``timm.models.create_feature_extractor``, to which factories may lead, too.
    """
    timm_models: Any = sys.modules.get("timm.models")
    if timm_models is None:
        return {}
    return {
        "leaf_modules": timm_models.get_notrace_modules(),
        "autowrap_functions": tuple(timm_models.get_notrace_functions()),
    }


def _mark_pooled(model: nn.Module) -> str:
    """Gives the pooled layer a node of its own; returns the node's name in ``_Whole``."""
    if isinstance(model, torchvision.models.SqueezeNet):  # its classifier is a convolution
        return "model.features"
    if hasattr(model, "get_classifier"):  # timm
        classifier = model.get_classifier()  # type: ignore[operator]
    else:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            return "output"
        classifier = linear[-1]
    for name, module in model.named_modules():
        if module is classifier:
            parent, _, attribute = name.rpartition(".")
            marked = nn.Sequential(nn.Identity(), module)
            setattr(model.get_submodule(parent), attribute, marked)
            return f"model.{name}.0"
    raise OptionError(
        "layer='pooled' is not available beside others: the model has two classifiers"
    )


def _prefixes(node: str) -> Iterator[str]:
    """``"layer1.0.conv1"``: ``"layer1"``, ``"layer1.0"`` and ``"layer1.0.conv1"``."""
    return itertools.accumulate(node.split("."), "{}.{}".format)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    return timm
