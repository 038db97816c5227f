"""The pooled layer: the input of a model's classifier.

timm models know their classifier. So does torchvision's SqueezeNet, whose classifier is a
convolution before ReLU and pooling. For any other model, running it shows the classifier.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torchvision.models
from torch import nn

from imagevec.errors import OptionError
from imagevec.models.checks import trial
from imagevec.models.classifier import find_classifier

Example = Callable[[int], torch.Tensor]

_SIZES = ("in_features", "in_channels", "out_features", "out_channels")


def without_classifier(model: nn.Module, example: Example) -> tuple[nn.Module, str]:
    """Returns a model that ends at its pooled layer, and the classifier that it drops.

    Args:
        model: The model, which is modified.
        example: A function that returns a model input with the given number of images or texts.
    """
    classifier: Any = _classifier(model, "pooled", example)
    dropped = _description(model, classifier)
    if not classifier:
        return model, ""
    if _timm_classifier(model) is not None:
        model.reset_classifier(0)  # type: ignore[operator]
    elif _is_squeezenet(model):
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)))
    else:
        _replace(model, classifier[0], _Dropped(classifier[0]))
        model = _Kept(model)
    return model, dropped


def mark_pooled(model: nn.Module, layers: tuple[str, ...], example: Example) -> tuple[str, str]:
    """Adds a node for the pooled layer. Returns its name, and the classifier behind it.

    Args:
        model: The model, which is modified.
        layers: The ``layer`` option.
        example: A function that returns a model input with the given number of images or texts.

    Raises:
        OptionError: The model has several classifiers, and ``"logits"`` needs them.
    """
    classifier = _classifier(model, layers, example)
    dropped = _description(model, classifier)
    if len(classifier) > 1:
        if "logits" in layers:
            raise OptionError(
                f"layer={layers!r}: the model has several classifiers, so 'pooled' cannot be "
                "combined with 'logits'"
            )
        model.reset_classifier(0)  # type: ignore[operator]
    if len(classifier) != 1:
        return "output", dropped
    name = _names(model)[classifier[0]]
    if _is_squeezenet(model):
        return "features", dropped
    _replace(model, classifier[0], _Marked(classifier[0]))
    return f"{name}.input", dropped


def _classifier(
    model: nn.Module, layer: str | tuple[str, ...], example: Example
) -> list[nn.Module]:
    """Returns the classifier: no module, one, or several for timm's distilled models."""
    if getattr(model, "returns_features", False):
        return []
    known = _timm_classifier(model)
    if known is not None:
        return known
    if _is_squeezenet(model):  # its convolution is followed by ReLU and average pooling
        return [model.get_submodule("classifier.1")]
    inputs = example(2)  # a model may run a layer once per image
    with trial(layer, model, inputs) as copy:
        name = find_classifier(copy, inputs)
    return [] if name is None else [model.get_submodule(name)]


def _timm_classifier(model: nn.Module) -> list[nn.Module] | None:
    """Returns the classifier of a timm model, or ``None`` for another model or classifier.

    A factory may replace the classifier by one that timm does not know. A backbone has none.
    """
    if not type(model).__module__.startswith("timm.") or not hasattr(model, "reset_classifier"):
        return None
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    modules = list(classifier) if isinstance(classifier, tuple | nn.ModuleList) else [classifier]
    modules = [x.fc if hasattr(x, "global_pool") else x for x in modules]  # heads that also pool
    plain = (nn.Linear, nn.Conv2d, nn.Identity)
    is_known = all(type(x) in plain or type(x).__module__.startswith("timm.") for x in modules)
    return [x for x in modules if not isinstance(x, nn.Identity)] if is_known else None


def _is_squeezenet(model: nn.Module) -> bool:
    """Returns whether the model is torchvision's SqueezeNet with a classifier of its own form."""
    if type(model) is not torchvision.models.SqueezeNet:
        return False
    form = [type(module) for module in model.get_submodule("classifier").children()]
    return form == [nn.Dropout, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d]


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def _description(model: nn.Module, modules: list[nn.Module]) -> str:
    """Describes layers of a model: ``"fc (Linear, 512 to 128)"``."""
    names = _names(model)
    texts = []
    for module in modules:
        sizes = [str(getattr(module, size)) for size in _SIZES if hasattr(module, size)]
        kind = ", ".join([type(module).__name__, *([" to ".join(sizes)] if sizes else [])])
        texts.append(f"{names[module]} ({kind})")
    return ", ".join(texts)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module under each of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


class _Marked(nn.Module):
    """A classifier whose input is a node of its own. It has the classifier's attributes."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.input = nn.Identity()
        self.classifier = classifier

    def forward(self, input: torch.Tensor) -> Any:
        return self.classifier(self.input(input))

    def __getattr__(self, name: str) -> Any:  # a model's code may read fc.weight.dtype
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("classifier"), name)


_kept = threading.local()
"""The input of the classifier in the forward pass of a thread, between two modules."""


class _Dropped(nn.Module):
    """Stands in for a linear layer or 1x1 convolution, and keeps its input for ``_Kept``.

    Returns logits of the right shape, because the model's code may depend on it. The weights have
    their shape, type and device, but take no memory.
    """

    def __init__(self, classifier: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._dim = 1 if isinstance(classifier, nn.Conv2d) else -1
        self._length: int = classifier.weight.shape[0]
        for size in _SIZES:
            if hasattr(classifier, size):
                setattr(self, size, getattr(classifier, size))
        for name in ("weight", "bias"):
            value = getattr(classifier, name)
            stand_in = None if value is None else value.detach().new_zeros(()).expand(value.shape)
            self.register_buffer(name, stand_in, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        _kept.features = input
        return input.narrow(self._dim, 0, 1).repeat_interleave(self._length, self._dim)


class _Kept(nn.Module):
    """Runs a model, and returns what the classifier gets: ``(N, D)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.model(inputs)
        features: torch.Tensor | None = _kept.__dict__.pop("features", None)
        if features is None:
            raise OptionError(
                "layer='pooled' is not available: the model runs its last layer for some inputs "
                "only; use layer='logits'"
            )
        return features.reshape(inputs.shape[0], -1).float()
