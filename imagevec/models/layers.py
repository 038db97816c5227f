"""Selects layers: turns a classifier into a module that returns feature vectors."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision.models
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from imagevec.errors import OptionError, did_you_mean


def to_feature_model(
    model: nn.Module,
    layer: str | tuple[str, ...],
    normalize: bool,
    example: Callable[[int], torch.Tensor] | None = None,
) -> nn.Module:
    """Turns a classifier into a model that returns feature vectors. Modifies the classifier.

    Returns:
        A module in evaluation mode, from float32 ``(N, 3, S, S)`` to ``(N, D)``. The vectors of
        several layers are normalised separately and concatenated: D is the sum of their lengths.

    Raises:
        OptionError: The layer does not exist. The message lists the nearest layers.
    """
    model.eval().requires_grad_(False)
    if layer == "pooled":
        model = _without_classifier(model)
    elif layer != "logits":
        return _up_to_nodes(model, layer if isinstance(layer, tuple) else (layer,), normalize)
    return nn.Sequential(model, _VectorNorm()).eval() if normalize else model


def infer_num_features(feature_model: nn.Module, example: torch.Tensor) -> tuple[int, ...]:
    """Returns the length of each layer's vector.

    On PyTorch's ``meta`` device, only shapes are computed, from stand-ins for the model's tensors.

    Args:
        feature_model: The result of ``to_feature_model``.
        example: An input for the model, on the CPU or on ``meta``.

    Raises:
        OptionError: The model's output is not a two-dimensional tensor.
    """
    names = feature_model.names if isinstance(feature_model, _Layers) else None
    model = feature_model.extractor if isinstance(feature_model, _Layers) else feature_model
    with torch.device(example.device), torch.inference_mode():
        if example.is_meta:
            tensors = itertools.chain(model.named_parameters(), model.named_buffers())
            stand_ins = {name: tensor.to("meta") for name, tensor in tensors}
            found = torch.func.functional_call(model, stand_ins, (example,))
        else:
            found = model(example)
    outputs = [found] if names is None else [found[name] for name in names]
    for output in outputs:
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output)
            raise OptionError(f"the model's output is not valid: {shape}, not a tensor (N, D)")
    return tuple(output.shape[1] for output in outputs)


class _VectorNorm(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.float(), dim=1)  # (N, D) -> (N, D)


class _Whole(nn.Module):
    """A model with a separate node ``output``. All other node names begin with ``model.``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.output(self.model(images))
        return output


class _Layers(nn.Module):
    """Returns the vectors of several layers of a model.

    Attributes:
        extractor: The module from ``(N, 3, S, S)`` to a dictionary of vectors ``(N, D)``.
        names: The keys of the dictionary, in layer order.
        norm: The module that is applied to each vector.
    """

    def __init__(self, extractor: nn.Module, names: list[str], normalize: bool) -> None:
        super().__init__()
        self.extractor = extractor
        self.names = names
        self.norm = _VectorNorm() if normalize else nn.Identity()

    def vectors(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns ``(N, D)`` for each layer."""
        vectors = self.extractor(images)
        return [self.norm(vectors[name]) for name in self.names]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.vectors(images), dim=1)  # several (N, D) -> (N, sum of D)


def _to_vector(node: torch.Tensor, first_token: int | None, patches: int | None) -> torch.Tensor:
    """Reduces a node's output to a vector, always in new memory.

    Args:
        node: ``(N, C)``, ``(N, T, C)``, ``(N, C, H, W)`` or ``(N, H, W, C)``. Images are square, so
            H and W are the two dimensions of equal length.
        first_token: The index of the first token to average; ``None`` uses the class token.
        patches: The number of image tokens. If T equals it, all tokens are averaged.
    """
    if not isinstance(node, torch.Tensor):
        kind = type(node).__name__
        raise OptionError(f"the layer's output is a {kind}, not a tensor: choose another layer")
    if node.ndim == 4:
        channels_last = node.shape[1] == node.shape[2] != node.shape[3]
        return node.mean((1, 2) if channels_last else (2, 3))
    if node.ndim != 3:
        return node.clone()
    if node.shape[1] == patches:
        return node.mean(1)
    return node[:, 0].clone() if first_token is None else node[:, first_token:].mean(1)


def _first_token(model: nn.Module) -> int | None:
    """Returns the index of the first image token if a timm model has no class token."""
    is_timm = hasattr(model, "reset_classifier")
    if not is_timm or getattr(model, "cls_token", None) is not None:
        return None
    return getattr(model, "num_prefix_tokens", 0)


def _without_classifier(model: nn.Module) -> nn.Module:
    """Truncates the model to the input of its classifier's last linear layer."""
    if getattr(model, "returns_features", False):
        return model
    if hasattr(model, "reset_classifier"):  # timm
        model.reset_classifier(0)  # type: ignore[operator]
    elif isinstance(model, torchvision.models.SqueezeNet):  # its classifier is a convolution
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)))
    else:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if linear:  # a factory may return a backbone without a classifier
            parent, _, name = linear[-1].rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    result: nn.Module = model
    return result


def _up_to_nodes(model: nn.Module, layers: tuple[str, ...], normalize: bool) -> nn.Module:
    """Truncates the model to the given layers, which one forward pass computes."""
    special = {"logits": "output"}
    if "pooled" in layers:
        special["pooled"] = _mark_pooled(model)
    whole = _Whole(model).eval()
    try:
        _, nodes = get_graph_node_names(whole, _not_to_trace(), suppress_diff_warning=True)
    except Exception as error:  # the model's own code runs under torch.fx's tracer
        layer = layers[0] if len(layers) == 1 else layers
        raise OptionError(
            f"layer={layer!r} is not available: torch.fx cannot trace the model ({error}); "
            "use only 'pooled' or 'logits', or a factory whose model ends at that layer"
        ) from error
    # A module's name refers to its last node. torchvision does the same, but if two names refer to
    # the same node, it resolves the second to another node.
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
        # Directly after the node: a later in-place operation would overwrite the node's output.
        with graph.inserting_after(node):
            vectors[name] = graph.call_function(_to_vector, (node, *pooling))
    output.args = (vectors,)
    return _Layers(fx.GraphModule(whole, graph), names, normalize).eval()


def _not_to_trace() -> dict[str, Any]:
    """Returns the parts of timm models that ``torch.fx`` must not trace into.

    They depend on the input's shape. ``timm.models.create_feature_extractor`` excludes the same
    parts. Factories may also return timm models.
    """
    timm_models: Any = sys.modules.get("timm.models")
    if timm_models is None:
        return {}
    return {
        "leaf_modules": timm_models.get_notrace_modules(),
        "autowrap_functions": tuple(timm_models.get_notrace_functions()),
    }


def _mark_pooled(model: nn.Module) -> str:
    """Adds a separate node for the pooled layer, and returns the node's name in ``_Whole``."""
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
        "layer='pooled' cannot be combined with other layers: the model has two classifiers"
    )


def _prefixes(node: str) -> Iterator[str]:
    """Yields the prefixes of a node name: ``"layer1"`` and ``"layer1.0"`` for ``"layer1.0"``."""
    return itertools.accumulate(node.split("."), "{}.{}".format)
