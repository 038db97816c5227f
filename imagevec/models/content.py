"""A digest of what a module computes, equal in every process.

A digest of the pickle would not work: in each process, cloudpickle names a class of ``__main__``
differently, and sets are pickled in a different order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imagevec.pickling import captured_by

_INSTALLED = {"site-packages", "dist-packages"}  # the second is Debian's
_ATOMS = (type(None), type(...), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def content_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of a module's classes, code, attributes and tensors as 64 hex digits.

    Classes and functions of installed libraries are hashed by name and version, all others by their
    code. Objects that cannot be inspected change the digest on every call.
    """
    hasher = _Hasher()
    hasher.add(module)
    return hasher.sha256.hexdigest()


class _Hasher:
    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # keeps values alive, so that ids stay unique

    def add(self, value: Any) -> None:
        if isinstance(value, _ATOMS):
            self._text(f"{type(value).__name__} {value!r}")
        elif id(value) in self._seen:
            self._text(f"the same as {self._seen[id(value)][0]}")
        else:
            self._seen[id(value)] = (len(self._seen), value)
            self._add_new(value)

    def _text(self, text: str) -> None:
        self.sha256.update(f"{len(text)}:{text}".encode())

    def _add_new(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._text(f"array {value.dtype} {value.shape}")
            self.sha256.update(np.ascontiguousarray(value).data)
        elif isinstance(value, types.ModuleType):
            self._text(f"module {value.__name__} {_version(value.__name__)}")
        elif isinstance(value, types.CodeType):
            self._text("code")
            self.sha256.update(value.co_code)
            self._add_all(value.co_names + value.co_varnames + value.co_freevars)
            self._add_all(value.co_consts)
        elif isinstance(value, types.FunctionType | type) and _is_of_a_library(value):
            self._text(f"library {value.__module__} {value.__qualname__}")
            self._text(_version(value.__module__))
        elif isinstance(value, types.FunctionType):
            self._text(f"function {value.__qualname__}")
            self.add(value.__code__)
            captured = list(captured_by(value, ""))
            self._add_all(item for pair in captured for item in pair)
            self._add_members([item for _, item in captured], sorted(_names(value.__code__)))
        elif isinstance(value, types.MethodType):
            self._add_all((value.__self__, value.__func__))
        elif isinstance(value, type):
            self._text(f"class {value.__qualname__}")
            self._add_all(value.__bases__)
            hidden = ("__dict__", "__weakref__", "__module__", "__doc__", "__annotations__")
            self._add_all(
                item for pair in vars(value).items() if pair[0] not in hidden for item in pair
            )
        elif isinstance(value, functools.partial):
            self._add_all((value.func, value.args, value.keywords))
        elif type(value) in (list, tuple, dict):
            self._text(f"{type(value).__name__} {len(value)}")
            pairs = value.items() if isinstance(value, dict) else zip(value, strict=True)
            self._add_all(item for pair in pairs for item in pair)
        elif type(value) in (set, frozenset):
            self._text(f"set {sorted(map(repr, value))}")
        elif isinstance(value, staticmethod | classmethod):
            self.add(value.__func__)
        elif isinstance(value, property):
            self._add_all((value.fget, value.fset, value.fdel))
        else:
            self._add_reduced(value)

    def _add_all(self, values: Any) -> None:
        for value in values:
            self.add(value)

    def _add_members(self, values: list[Any], names: list[str]) -> None:
        """Hashes what a function with these names reads from modules, as in ``module.name``."""
        seen: set[str] = set()
        modules = [value for value in values if isinstance(value, types.ModuleType)]
        while modules:
            module = modules.pop()
            if module.__name__ in seen or _is_library(module):
                continue
            seen.add(module.__name__)
            members = [(name, vars(module)[name]) for name in names if name in vars(module)]
            modules += [item for _, item in members if isinstance(item, types.ModuleType)]
            self._add_all(item for pair in members for item in pair)

    def _add_tensor(self, value: torch.Tensor) -> None:
        self._text(f"tensor {value.dtype} {tuple(value.shape)}")
        try:
            flat = value.detach().cpu().contiguous().reshape(-1)
            self.sha256.update(flat.view(torch.uint8).numpy().data)
        except RuntimeError:  # sparse, quantized, or without storage
            self.sha256.update(os.urandom(32))

    def _add_reduced(self, value: Any) -> None:
        """Hashes what pickle would write for any other object: its class and its state."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # a lock, a file, or an error in the object's own code
            self.sha256.update(os.urandom(32))
            return
        self._text("object")
        parts = (reduced, type(value).__module__) if isinstance(reduced, str) else reduced
        self._add_all(list(part) if isinstance(part, Iterator) else part for part in parts)


def _is_of_a_library(value: Any) -> bool:
    """Returns whether a class or function can be found by name in code with a known version."""
    module = sys.modules.get(value.__module__ or "")
    return module is not None and "<locals>" not in value.__qualname__ and _is_library(module)


def _is_library(module: types.ModuleType) -> bool:
    """Returns whether a module belongs to Python, or to an installed package with a version."""
    if module.__name__ == "__main__":
        return False
    if module.__name__.partition(".")[0] in sys.stdlib_module_names:
        return True
    file = getattr(module, "__file__", None) or ""
    is_installed = not _INSTALLED.isdisjoint(Path(file).parts)
    return is_installed and _version(module.__name__) != ""


def _names(code: types.CodeType) -> set[str]:
    """Returns the names of globals and attributes in the code of a function."""
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, nested))


@functools.cache
def _version(module: str) -> str:
    """Returns the version of a module's package; empty if it is unknown."""
    name = module.partition(".")[0]
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
    return str(version or "")
