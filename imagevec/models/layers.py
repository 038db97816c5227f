"""Selects layers: turns a classifier into a module that returns feature vectors."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from imagevec.errors import OptionError, did_you_mean
from imagevec.models.checks import check_vectors, check_weights, trial
from imagevec.models.pooled import Example, mark_pooled, without_classifier


def to_feature_model(
    model: nn.Module,
    layer: str | tuple[str, ...],
    normalize: bool,
    example: Example,
) -> FeatureModule:
    """Turns a classifier into a model that returns feature vectors. Modifies the classifier.

    ``"pooled"`` is the input of the model's classifier, as timm or torchvision define it, or as
    ``find_classifier`` finds it by running the model. Without one, it is the model's output.

    Args:
        model: A model with float32 weights.
        layer: The ``layer`` option.
        normalize: Whether to scale vectors to length 1.
        example: A function that returns a model input with the given number of images or texts,
            on the CPU, or on PyTorch's ``meta`` device to compute only shapes.

    Raises:
        OptionError: The layer does not exist, with the nearest layers in the message; the model
            cannot run on the example; or its weights are not float32.
    """
    check_weights(model)
    model.eval()
    for parameter in model.parameters():  # ScriptModules lack requires_grad_
        parameter.requires_grad_(False)
    if layer == "pooled":
        return FeatureModule(*without_classifier(model, example), layer, normalize).eval()
    if layer == "logits":
        return FeatureModule(model, "", layer, normalize).eval()
    return FeatureModule(*_up_to_nodes(model, layer, example), layer, normalize).eval()


def infer_num_features(feature_model: nn.Module, example: torch.Tensor) -> tuple[int, ...]:
    """Returns the length of each layer's vector.

    Args:
        feature_model: A module that returns feature vectors.
        example: An input for the model, on the CPU, or on ``meta`` to compute only shapes.

    Raises:
        OptionError: The model cannot run on the example, or does not return float32 ``(N, D)``.
    """
    layer = feature_model.layer if isinstance(feature_model, FeatureModule) else "pooled"
    with trial(layer, feature_model, example) as model:
        outputs = model.outputs(example) if isinstance(model, FeatureModule) else (model(example),)
    for output in outputs:
        check_vectors(layer, output, len(example))
    return tuple(output.shape[1] for output in outputs)


class FeatureModule(nn.Module):
    """A model that returns feature vectors, float32 ``(N, 3, H, W)`` to ``(N, D)``.

    The vectors of several layers are normalised separately and concatenated: D is the sum of their
    lengths.

    Args:
        model: A module that returns ``(N, D)``, or a tuple of them for several layers.
        dropped: The classifier that was dropped, such as ``"fc (Linear, 512 to 128)"``, or empty.
        layer: The ``layer`` option.
        normalize: Whether to scale vectors to length 1.
    """

    def __init__(
        self, model: nn.Module, dropped: str, layer: str | tuple[str, ...], normalize: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.dropped = dropped
        self.layer = layer
        self.normalize = normalize

    def outputs(self, inputs: torch.Tensor) -> tuple[Any, ...]:
        """Returns the output of each layer, before it is normalised."""
        output = self.model(inputs)
        return output if isinstance(self.layer, tuple) else (output,)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        vectors = self.outputs(inputs)
        if self.normalize:
            vectors = tuple(F.normalize(vector.float(), dim=1) for vector in vectors)
        features: torch.Tensor = vectors[0]
        return features if len(vectors) == 1 else torch.cat(vectors, dim=1)  # (N, sum of D)


class _Whole(nn.Module):
    """A model with a separate node ``output``. All other node names begin with ``model.``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.output(self.model(images))
        return output


def _to_vector(
    node: torch.Tensor, first_token: int | None, patches: int | None, aspect: float
) -> torch.Tensor:
    """Reduces a node's output to a vector, always in new memory.

    Args:
        node: ``(N, C)``, ``(N, T, C)``, ``(N, C, H, W)`` or ``(N, H, W, C)``.
        first_token: The index of the first token to average; ``None`` uses the class token.
        patches: The number of image tokens. If T equals it, all tokens are averaged.
        aspect: The height of the input over its width, by which H and W are told from C.
    """
    if not isinstance(node, torch.Tensor):
        kind = type(node).__name__
        raise OptionError(f"the layer's output is a {kind}, not a tensor: choose another layer")
    if node.ndim == 4:
        _, a, b, c = map(int, node.shape)
        channels_last = abs(math.log(a / b / aspect)) < abs(math.log(b / c / aspect))
        return node.mean((1, 2) if channels_last else (2, 3))
    if node.ndim != 3:
        return node.clone()
    if node.shape[1] == patches:
        return node.mean(1)
    return node[:, 0].clone() if first_token is None else node[:, first_token:].mean(1)


def _flat(node: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return node.clone().reshape(inputs.shape[0], -1).float()  # (N, ...) -> (N, D)


def _first_token(model: nn.Module) -> int | None:
    """Returns the index of the first image token if a timm model has no class token."""
    is_timm = hasattr(model, "reset_classifier")
    if not is_timm or getattr(model, "cls_token", None) is not None:
        return None
    return getattr(model, "num_prefix_tokens", 0)


def _up_to_nodes(
    model: nn.Module, layer: str | tuple[str, ...], example: Example
) -> tuple[fx.GraphModule, str]:
    """Returns a model that ends at the given layers, and the classifier that it drops.

    One forward pass computes all layers. The model returns a tuple for a tuple of layers.
    """
    layers = layer if isinstance(layer, tuple) else (layer,)
    special, dropped = {"logits": "output"}, ""
    if "pooled" in layers:
        name, dropped = mark_pooled(model, layers, example)
        special["pooled"] = name if name == "output" else f"model.{name}"
    whole = _Whole(model).eval()
    try:
        _, nodes = get_graph_node_names(whole, _not_to_trace(), suppress_diff_warning=True)
    except Exception as error:  # the model's own code runs under torch.fx's tracer
        raise OptionError(
            f"layer={layer!r} is not available: torch.fx cannot trace the model ({error}); "
            "use only 'pooled' or 'logits', or a factory whose model ends at that layer"
        ) from error
    # A module's name refers to its last node. torchvision does the same, but if two names refer to
    # the same node, it resolves the second to another node.
    last = {prefix: node for node in nodes for prefix in _prefixes(node)}
    known = {name.removeprefix("model."): node for name, node in last.items() if "." in name}
    known |= {name: last[node] for name, node in special.items() if node in last}
    for name in layers:
        if name not in known:
            near = did_you_mean(name, {*known, "pooled", "logits"} - {name})
            raise OptionError(f"layer={name!r} is not known: {near}")
    extractor = create_feature_extractor(
        whole,
        [known[name] for name in layers],
        tracer_kwargs=_not_to_trace(),
        suppress_diff_warning=True,
    )
    graph = extractor.graph
    inputs, *_, output = graph.nodes
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)  # timm
    height, width = example(1).shape[-2:]
    vectors = {}
    for name, node in output.args[0].items():
        # Directly after the node: a later in-place operation would overwrite the node's output.
        with graph.inserting_after(node):
            if name == "output":
                vectors[name] = node
            elif name == known.get("pooled") and name.endswith(".input"):  # see mark_pooled
                vectors[name] = graph.call_function(_flat, (node, inputs))
            else:
                pooling = (_first_token(model), patches, height / width)
                vectors[name] = graph.call_function(_to_vector, (node, *pooling))
    results = tuple(vectors[known[name]] for name in layers)
    output.args = (results if isinstance(layer, tuple) else results[0],)
    return fx.GraphModule(whole, graph), dropped


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


def _prefixes(node: str) -> Iterator[str]:
    """Yields the prefixes of a node name: ``"layer1"`` and ``"layer1.0"`` for ``"layer1.0"``."""
    return itertools.accumulate(node.split("."), "{}.{}".format)
