"""Finds the classifier of a model by running it once.

The classifier is the linear layer or 1x1 convolution whose output is the model's output, apart from
a change of shape and softmax or sigmoid. It gives one vector per image, is called once, and nothing
else reads its input. What counts is the flow of data, so neither names nor the order in which
layers are registered matter:

    fc(x), fc(x).softmax(1), fc(x).flatten(1)      fc is the classifier
    fc(x).tanh(), F.normalize(fc(x)), fc(x) + x    none: the output is an embedding
    cat([a(x), b(x)], dim=1), x * gate(x)          none
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose output contains the elements of their first input, if it contains as many.
_COPIES = frozenset(
    """
    _reshape_alias _to_copy _unsafe_view alias alpha_dropout cat clone concat contiguous detach
    detach_ dropout expand feature_alpha_dropout feature_dropout flatten lift_fresh movedim permute
    reshape reshape_as select slice squeeze squeeze_ stack to transpose type_as unflatten unsqueeze
    unsqueeze_ view view_as
    """.split()  # noqa: SIM905, shorter
)
_PROBABILITIES = frozenset(
    """
    _log_softmax _softmax log_sigmoid log_softmax sigmoid sigmoid_ softmax special_expit
    special_log_softmax special_softmax
    """.split()  # noqa: SIM905
)
_LINEAR = frozenset(("linear", "conv2d"))


def find_classifier(model: nn.Module, inputs: torch.Tensor) -> str | None:
    """Returns the name of a model's classifier, or ``None`` if it has none.

    Args:
        model: A model in evaluation mode.
        inputs: An input of the model. If it is on ``meta``, so is the model, and values that
            Python code reads are not available.
    """
    layers = {name: module for name, module in model.named_modules() if name and _is_linear(module)}
    if not layers:
        return None
    flow = _Flow()
    replaced = {name: module.__dict__.get("forward") for name, module in layers.items()}
    try:
        # Hooks would miss fc.forward(x).
        for name, module in layers.items():
            module.forward = functools.partial(flow.call, name, module.forward)
        with torch.device(inputs.device), torch.inference_mode(), _without_compilation(), flow:
            output = model(inputs)
    finally:
        for name, module in layers.items():
            del module.forward
            if replaced[name] is not None:
                module.forward = replaced[name]
    return flow.classifier(output, layers, len(inputs))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        is_plain = module.groups == 1 and module.stride == (1, 1)
        return is_plain and module.kernel_size == (1, 1) and module.padding in ((0, 0), "same")
    return isinstance(module, nn.Linear)


def _without_compilation() -> contextlib.AbstractContextManager[Any]:
    """Runs functions of ``torch.compile`` eagerly: they do not run in a dispatch mode."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    return contextlib.nullcontext() if set_stance is None else set_stance("force_eager")


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows values through the operations of a forward pass.

    Each value has a number, which tensors share that contain the same elements. In inference mode,
    ``linear`` or ``softmax`` is a single operation.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._new_value = itertools.count().__next__
        # By the id of a tensor: the tensor, the writes to its storage so far, and the value.
        self._values: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
        self._writes: Counter[int] = Counter()  # by storage
        self._layer: str | None = None  # the layer that is running
        self._calls: Counter[str] = Counter()
        self._inputs: dict[str, int] = {}  # the value that a layer gets
        self._readers: defaultdict[int, set[str | None]] = defaultdict(set)  # layers, by value
        self._made_by: dict[int, tuple[str, str | None, int]] = {}  # operation, layer, input

    def call(self, layer: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the ``forward`` of a layer."""
        inputs = _tensors((args, kwargs))
        self._calls[layer] += 1
        self._inputs[layer] = self._value(inputs[0]) if len(inputs) == 1 else self._new_value()
        self._layer, outer = layer, self._layer
        output = forward(*args, **kwargs)
        self._layer = outer
        return output

    def classifier(self, output: Any, layers: dict[str, nn.Module], count: int) -> str | None:
        """Returns the name of the classifier, given the model's output for ``count`` images."""
        if not isinstance(output, torch.Tensor):
            return None
        operation, name, value = self._made_by.get(self._value(output), ("", None, 0))
        while operation in _PROBABILITIES:
            operation, name, value = self._made_by.get(value, ("", None, 0))
        if operation not in _LINEAR or name is None:
            return None
        layer: Any = layers[name]
        length = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        is_only_reader = self._readers[self._inputs[name]] == {name}
        is_vector = output.numel() == count * length
        return name if self._calls[name] == 1 and is_only_reader and is_vector else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::")
        inputs = _tensors((args, kwargs))
        values = [self._value(tensor) for tensor in inputs]
        result = func(*args, **(kwargs or {}))
        outputs = _tensors(result)
        if name in _COPIES and _is_copy(name, args, inputs, outputs):
            self._set(outputs[0], values[0])
            return result
        for value in values:
            self._readers[value].add(self._layer)
        written = _written(func, args, kwargs or {})
        self._writes.update(map(_storage, written))
        for output in (*written, *outputs):
            value = self._set(output, self._new_value())
            if values:
                self._made_by[value] = (name, self._layer, values[0])
        return result

    def _value(self, tensor: torch.Tensor) -> int:
        reference, writes, value = self._values.get(id(tensor), (None, 0, 0))
        is_known = reference is not None and reference() is tensor
        if is_known and writes == self._writes[_storage(tensor)]:
            return value
        return self._set(tensor, self._new_value())  # an input, or written through an alias

    def _set(self, tensor: torch.Tensor, value: int) -> int:
        self._values[id(tensor)] = (weakref.ref(tensor), self._writes[_storage(tensor)], value)
        return value


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_copy(
    name: str, args: tuple[Any, ...], inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> bool:
    is_random = name.endswith("dropout") and args[2]  # its argument ``train``
    same_length = len(outputs) == 1 and outputs[0].numel() == inputs[0].numel()
    return same_length and outputs[0].is_floating_point() and not is_random


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors that an operation writes into, apart from its new outputs."""
    arguments = func._schema.arguments if hasattr(func, "_schema") else ()
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    names = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    return _tensors([given.get(name) for name in names])


def _storage(tensor: torch.Tensor) -> int:
    """Returns a number that tensors share if one sees what is written into the other."""
    try:
        number: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # PyTorch's answer for tensors without storage, such as sparse ones
        return id(tensor)
    return number
