"""Digests of what a factory and its module compute, equal in every process.

A digest of the pickle would not work: in each process, cloudpickle names a class of ``__main__``
differently, and sets are pickled in a different order.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import logging
import os
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from imagevec.models.syntax import syntax_of
from imagevec.pickling import captured_by, imported_by, is_installed, names_in

_ATOMS = (type(None), type(...), bool, int, float, complex, str, bytes) + (
    torch.device,
    torch.dtype,
    torch.layout,
    torch.memory_format,
)
# These differ between processes or machines, and do not determine a model's output.
_WITHOUT_STATE = (PurePath, logging.Logger, logging.Handler, torch.Generator, random.Random) + (
    (np.random.Generator, np.random.RandomState, np.random.BitGenerator, weakref.ref)
    + (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
)
# Set on modules by timm and transformers to describe weights, on classes by Python and PyTorch.
_METADATA = ("default_cfg", "pretrained_cfg", "transformers_version", "_name_or_path")
_GENERATED = ("__dict__", "__weakref__", "__annotate__", "__annotate_func__", "_backward_cls")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_pre_hooks")
_OF_ANY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}
_OF_GRAPHS = {"_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras", "meta"}

# Models of these libraries are identified by name, so a factory in one of them is, too.
_NAMED = ("open_clip", "timm", "torch", "torchvision", "transformers")


def content_digest(value: Any) -> str:
    """Returns the SHA-256 of a module's classes, code, attributes and tensors as 64 hex digits.

    Classes and functions of installed libraries are hashed by name and version, all others by their
    code. Objects that cannot be inspected change the digest on every call.
    """
    return _Hasher(exact=True).digest(value)


def code_digest(factory: Any, module: nn.Module) -> str:
    """Returns a digest of what a factory and its module compute, besides the weights.

    The weights are the tensors of the state dict. Everything else counts: functions and classes
    with what they read and capture, attributes, hooks, and other tensors. The digest is the same in
    each process and on each machine, and in each version of Python for code that has a source.

    These do not count: comments, docstrings, annotations, layout, the names of modules, paths,
    loggers, random generators, and what a function itself changes, such as a cache. Of objects that
    cannot be inspected, such as locks and objects of C extensions, only the class counts.

    Classes and functions of installed libraries count by name, without the version. The package of
    the factory counts by its code, even if it is installed.

    Returns:
        16 hex digits.
    """
    weights = frozenset(map(id, _weights_of(module)))
    hasher = _Hasher(exact=False, package=_package_of(factory), weights=weights)
    return hasher.digest((factory, module))[:16]


class _Hasher:
    """Hashes a value and all that it refers to. References are hashed as numbers.

    Args:
        exact: Whether to hash weights, versions of libraries, and random bytes for what cannot be
            inspected.
        package: An installed package that counts by its code.
        weights: The ids of tensors that only count by shape.
    """

    def __init__(
        self, *, exact: bool, package: str = "", weights: frozenset[int] = frozenset()
    ) -> None:
        self._exact = exact
        self._package = package
        self._weights = weights
        self._sha256 = hashlib.sha256()
        self._numbers: dict[int, tuple[int, Any]] = {}  # keeps values alive: ids stay unique
        self._pending: deque[Any] = deque()

    def digest(self, value: Any) -> str:
        self._add(value)
        while self._pending:  # without recursion: chains of objects can be long
            self._add(tuple(self._parts(self._pending.popleft())))
        return self._sha256.hexdigest()

    def _add(self, value: Any) -> None:
        if type(value) in _ATOMS:
            self._text(f"{type(value).__name__} {value!r}")
        elif type(value) in (tuple, torch.Size):
            self._text(f"tuple {len(value)}")
            for item in value:
                self._add(item)
        else:
            if id(value) not in self._numbers:
                self._numbers[id(value)] = len(self._numbers), value
                self._pending.append(value)
            self._text(f"object {self._numbers[id(value)][0]}")

    def _text(self, text: str) -> None:
        self._sha256.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))

    def _parts(self, value: Any) -> Iterable[Any]:
        """Returns what determines a value, in an order that is the same in every process."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return "array", str(value.dtype), value.shape, _sha256(value.tobytes())
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            is_library = self._is_library(value)
            return ("module", *(self._by_name(value.__name__, "") if is_library else ()))
        if isinstance(value, types.MethodType):
            return "method", value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return "partial", value.func, value.args, *sorted(value.keywords.items())
        if isinstance(value, functools._lru_cache_wrapper):
            return "cached", value.__wrapped__
        if isinstance(value, staticmethod | classmethod):
            return type(value).__name__, value.__func__
        if isinstance(value, property):
            return "property", value.fget, value.fset, value.fdel
        if isinstance(value, functools.cached_property):
            return "property", value.func
        if isinstance(value, enum.Enum):
            return "member", type(value), value.name
        if type(value) in (list, dict, types.MappingProxyType):
            items = value if isinstance(value, list) else value.items()
            return type(value).__name__, *items
        if type(value) in (set, frozenset):
            return "set", *sorted(self._same().digest(item) for item in value)
        if isinstance(value, torch.jit.ScriptFunction):
            return "script", value.code
        if isinstance(value, fx.Graph):
            return "graph", value.python_code("self").src
        if isinstance(value, torch._ops.OpOverloadPacket | torch._ops.OpOverload | np.ufunc):
            return "operator", str(value)
        return self._object(value)

    def _same(self) -> _Hasher:
        return _Hasher(exact=self._exact, package=self._package, weights=self._weights)

    def _tensor(self, value: torch.Tensor) -> Iterable[Any]:
        if isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer):
            return "uninitialized", value.dtype
        kind = ("tensor", value.dtype, value.shape)
        if id(value) in self._weights or value.is_meta:
            return kind
        try:
            flat = value.detach().cpu().contiguous().reshape(-1)
            return *kind, _sha256(flat.view(torch.uint8).numpy().data)
        except RuntimeError:  # sparse, quantized, or without storage
            return *kind, *self._opaque(value)

    def _module(self, value: nn.Module) -> Iterable[Any]:
        if isinstance(value, torch.jit.ScriptModule):
            return self._script(value)
        if type(value).__module__.startswith("torch._dynamo."):  # torch.compile
            return "compiled", value._modules["_orig_mod"]
        is_graph = isinstance(value, fx.GraphModule)
        without = _OF_ANY_MODULE | (_OF_GRAPHS if is_graph else set())
        state = {k: v for k, v in vars(value).items() if k not in without}
        for name in value._parameters:  # of a norm, whose hook computes a tensor in each forward
            computed = name.removesuffix("_v").removesuffix("_orig")
            if isinstance(state.get(computed), torch.Tensor):
                del state[computed]
        buffers = {k: v for k, v in value._buffers.items() if v is not None}
        return (
            "graph" if is_graph else type(value),
            tuple(self._state(state)),
            tuple(pair for pair in value._parameters.items() if pair[1] is not None),
            tuple((name, self._buffer(buffer)) for name, buffer in buffers.items()),
            tuple(value._modules.items()),
            *(tuple(vars(value).get(name, {}).values()) for name in _HOOKS),
        )

    def _script(self, value: Any) -> Iterable[Any]:
        """Returns the code of TorchScript, with the attributes of its modules as constants."""
        try:
            frozen = torch.jit.freeze(value.eval(), optimize_numerics=False)
        except (RuntimeError, AttributeError):  # it has no forward
            return self._opaque(value)
        return ("script", frozen.code, *(value.state_dict().items() if self._exact else ()))

    def _buffer(self, value: torch.Tensor) -> Any:
        """Returns a buffer, or if it is not in the state dict, an approximation.

        Tables of sines and the like differ in their last digits between processors.
        """
        if self._exact or id(value) in self._weights or not value.is_floating_point():
            return value
        flat = value.detach().cpu().double().reshape(-1)
        if value.is_meta or not flat.isfinite().all():
            return value
        norm = float(flat.norm())
        places = torch.linspace(0, 1, len(flat), dtype=flat.dtype)
        sums = (float(flat.sum()), float(flat @ places))
        scale = norm * len(flat) ** 0.5 or 1.0
        rounded = (round(number / scale, 5) + 0.0 for number in sums)  # never -0.0
        return "buffer", value.dtype, value.shape, f"{norm:.4e}", *rounded

    def _function(self, value: types.FunctionType) -> Iterable[Any]:
        if (name := self._name_in_library(value)) is not None:
            return self._by_name(value.__module__, name)
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return "compiled", compiled
        captured = dict(captured_by(value, ""))
        scope = value.__globals__.get("__name__")
        if self._is_library(sys.modules.get(scope or "")):  # the wrapper of a decorator
            captured = {k: v for k, v in captured.items() if not k.startswith(".__globals__")}
            wrapper = self._by_name(scope, value.__code__.co_name)
            return *wrapper, *self._state({**captured, **vars(value)})
        syntax = syntax_of(value)
        if not self._exact:
            changed = syntax.mutated | _assigned(value.__code__) | {"__file__", "__spec__"}
            captured = _without_folder(captured, value.__globals__.get("__file__"))
            captured = {k: v for k, v in captured.items() if _global_name(k) not in changed}
        modules = [item for item in captured.values() if isinstance(item, types.ModuleType)]
        members = self._members([*modules, *imported_by(value)], names_in(value.__code__))
        return "function", syntax.text, *self._state({**captured, **vars(value)}), *members

    def _members(self, modules: list[types.ModuleType], names: set[str]) -> Iterator[Any]:
        """Yields what a function with these names reads from modules, as in ``module.name``."""
        seen: set[str] = set()
        while modules:
            module = modules.pop()
            if module.__name__ in seen or self._is_library(module):
                continue
            seen.add(module.__name__)
            members = {name: vars(module)[name] for name in sorted(names & vars(module).keys())}
            modules += [item for item in members.values() if isinstance(item, types.ModuleType)]
            yield from self._state(members)

    def _class(self, value: type) -> Iterator[Any]:
        if self._is_library(sys.modules.get(value.__module__)):
            yield from self._by_name(value.__module__, value.__qualname__)
            if self._name_in_library(value) is None:  # made from another class
                yield value.__bases__
            return
        yield from ("class", value.__bases__)
        if not self._is_library(sys.modules.get(type(value).__module__)):
            yield type(value)
        members = dict(vars(value))
        is_enum = issubclass(value, enum.Enum)
        is_named_tuple = issubclass(value, tuple) and "_fields" in members
        for member in members.get("_member_map_", {}).values() if is_enum else ():
            yield member.name, member.value
        if is_named_tuple:
            yield members["_fields"], members["_field_defaults"]
        for field in members.get("__dataclass_fields__", {}).values():
            yield field.name, field.default, field.default_factory
        if is_enum or is_named_tuple:
            members = {k: v for k, v in members.items() if _function_in(v) is not None}
        if is_enum or is_named_tuple or "__dataclass_fields__" in members:
            members = {k: v for k, v in members.items() if not self._is_generated(k, v)}
        yield from self._state({k: v for k, v in members.items() if _is_of_class(k, v)})

    def _is_generated(self, name: str, member: Any) -> bool:
        """Returns whether Python wrote a method, such as the ``__init__`` of a dataclass."""
        function = _function_in(member)
        if function is None or not name.startswith("_"):
            return False
        module = sys.modules.get(function.__globals__.get("__name__", ""))
        return function.__code__.co_filename == "<string>" or self._is_library(module)

    def _object(self, value: Any) -> Iterable[Any]:
        """Returns what pickle would write for any other object: its class and its state."""
        if not self._exact:
            for kind in _WITHOUT_STATE:  # not its own class: NNCF replaces that of new loggers
                if isinstance(value, kind):
                    return "opaque", kind.__qualname__
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # a lock, a file, or an error in the object's own code
            return self._opaque(value)
        if isinstance(reduced, str):
            module = getattr(value, "__module__", None) or type(value).__module__
            return "object", module if self._is_library(sys.modules.get(module)) else "", reduced
        parts = [tuple(part) if isinstance(part, Iterator) else part for part in reduced]
        if len(parts) > 2 and isinstance(parts[2], dict):
            parts[2] = tuple(self._state(parts[2]))
        return "object", *parts

    def _state(self, state: dict[Any, Any]) -> Iterator[Any]:
        """Yields names and values, sorted.

        Empty attributes only count if the digest is exact: new versions of libraries add some.
        """
        for name, value in sorted(state.items(), key=lambda item: str(item[0])):
            is_empty = type(value) in (list, dict, tuple, set) and not value
            is_empty = is_empty or value is None or value is False
            if self._exact or not (is_empty or name in _METADATA):
                yield name, value

    def _opaque(self, value: Any) -> Iterable[Any]:
        return "opaque", os.urandom(32) if self._exact else type(value).__qualname__

    def _by_name(self, module: str | None, name: str) -> Iterable[Any]:
        return "library", module, name, _version(module or "") if self._exact else ""

    def _is_library(self, module: types.ModuleType | None) -> bool:
        """Returns whether a module belongs to Python, or to an installed package with a version."""
        if module is None or not is_installed(module.__name__):
            return False
        package = module.__name__.partition(".")[0]
        if package in sys.stdlib_module_names:
            return True
        return package != self._package and _version(package) != ""

    def _name_in_library(self, value: Any) -> str | None:
        """Returns the name by which a library's module has a class or function, or ``None``."""
        module = sys.modules.get(value.__module__ or "")
        if not self._is_library(module):
            return None
        for name in (value.__qualname__, value.__name__):
            with contextlib.suppress(AttributeError):
                if functools.reduce(getattr, name.split("."), module) is value:
                    return str(name)
        return None


def _package_of(factory: Any) -> str:
    while isinstance(factory, functools.partial):
        factory = factory.func
    package = str(factory.__module__).partition(".")[0]
    return "" if package in _NAMED else package


def _weights_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the tensors of the state dict."""
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and name not in part._non_persistent_buffers_set:
                yield tensor


def _without_folder(captured: dict[str, Any], file: str | None) -> dict[str, Any]:
    """Removes the folder of a function's file from texts, as in ``os.path.dirname(__file__)``."""
    folder = os.path.dirname(file or "")
    if not folder:
        return captured
    return {k: v.replace(folder, "") if type(v) is str else v for k, v in captured.items()}


def _global_name(path: str) -> str | None:
    return path.split("'")[1] if path.startswith(".__globals__") else None


def _assigned(code: types.CodeType) -> set[str]:
    """Returns the globals that a function assigns."""
    steps = dis.get_instructions(code)
    names = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return names.union(*map(_assigned, nested))


def _function_in(member: Any) -> types.FunctionType | None:
    """Returns the function in a member of a class, without decorators."""
    found = getattr(member, "__func__", getattr(member, "fget", member))
    found = inspect.unwrap(found) if callable(found) else found
    return found if isinstance(found, types.FunctionType) else None


def _is_of_class(name: str, member: Any) -> bool:
    """Returns whether a member is the code of a class, or one of its attributes."""
    if name in _GENERATED or name.startswith("_abc_"):
        return False
    return not name.startswith("__") or callable(member) or hasattr(type(member), "__get__")


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def _version(module: str) -> str:
    """Returns the version of a module's package; empty if it is unknown."""
    name = module.partition(".")[0]
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
    return str(version or "")
