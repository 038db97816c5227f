"""The serialization guard: finds captured objects that Spark should not pickle with a function.

Spark pickles a UDF with everything it captures through its closure, ``self`` or global names. A
captured SparkSession then fails with CONTEXT_ONLY_VALID_ON_DRIVER (SPARK-5063), and a captured
model is copied into every task. This module finds such objects before a job starts and reports the
path to each. It does not import Spark: it recognises objects by the names of their classes.
"""

from __future__ import annotations

import dis
import functools
import importlib
import io
import logging
import socket
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle

from imagevec.errors import SerializationError

logger = logging.getLogger(__name__)

_MAX_DEPTH = 12
_LARGE_BYTES = 1_000_000
_MAX_SIZED_ITEMS = 100  # the items of a larger container have no sizes of their own

_FIXES = {
    "SparkContext": "create it on the driver and keep it out of what runs on workers",
    "SparkSession": "create it on the driver and keep it out of what runs on workers: "
    "use a local variable or an argument, not an attribute of self",
    "DataFrame": "collect what the function needs, or join it on the driver",
    "RDD": "collect what the function needs, or join it on the driver",
    "Broadcast": "load the value in the function: a broadcast belongs to one session",
    "lock": "create it where it is used, on the worker",
    "open file": "pass its path, and open it on the worker",
    "socket": "connect on the worker",
    "nn.Module": "return it from a function, which runs once per worker: a live model would be "
    "pickled into every task",
}

_SPARK_CLASSES = ("SparkContext", "SparkSession", "DataFrame", "RDD", "Broadcast")
_ATOMS = {type(None), bool, int, float, complex, str, bytes}
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event)


@dataclass(frozen=True)
class CapturedObject:
    """A captured object that must not be pickled.

    Attributes:
        path: The path to the object, for example ``"factory.__closure__[0] -> self.spark"``.
        kind: The kind of object, for example ``"SparkSession"``.
        fix: The recommended fix.
    """

    path: str
    kind: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path} is a {self.kind}: {self.fix}"


@dataclass(frozen=True)
class PickleReport:
    """The result of ``explain_pickle``.

    Attributes:
        size_bytes: The size of the pickle; ``None`` if the function cannot be pickled.
        problems: The captured objects that must not be pickled.
        parts: The pickled sizes of the captured objects in bytes, by path, largest first.
        error: The pickler's error; ``None`` if the function can be pickled.
    """

    size_bytes: int | None
    problems: tuple[CapturedObject, ...]
    parts: Mapping[str, int]
    error: str | None

    def __str__(self) -> str:
        size = "cannot be pickled" if self.size_bytes is None else f"{self.size_bytes:,} bytes"
        lines = [f"{size}{f' ({self.error})' if self.error else ''}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  {part_bytes:>12,} bytes  {path}" for path, part_bytes in self.parts.items()]
        return "\n".join(lines)


def explain_pickle(function: Callable[..., object], name: str = "fn") -> PickleReport:
    """Reports what Spark would pickle with a function, and which captured objects are problems.

        print(imagevec.explain_pickle(my_udf_function))

    Args:
        function: A function, method or callable object that is to run on workers.
        name: The first part of the paths in the report.
    """
    found = list(_walk(function, name, {}, 0))
    problems = tuple(
        CapturedObject(path, kind, _FIXES[kind]) for path, _, kind in found if kind is not None
    )
    sizes = {path: _pickled_bytes(value) for path, value, kind in found if kind is None}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    try:
        size_bytes, error = len(cloudpickle.dumps(function)), None
    except Exception as raised:  # pickling runs the objects' own code
        size_bytes, error = None, f"{type(raised).__name__}: {raised}"
    return PickleReport(size_bytes, problems, dict(largest), error)


def check_pickle(function: Callable[..., object]) -> None:
    """Checks that a function can be pickled, and logs a warning if the pickle exceeds 1 MB.

    Raises:
        SerializationError: The function captures objects that must not be pickled. The message
            gives the path to each of them and the fix.
    """
    name = getattr(function, "__name__", "factory").replace("<lambda>", "factory")
    report = explain_pickle(function, name)
    if report.problems:
        raise SerializationError("; ".join(map(str, report.problems)))
    if report.size_bytes is None:
        raise SerializationError(f"{name} cannot be pickled: {report.error}")
    if report.size_bytes > _LARGE_BYTES:
        parts = ", ".join(f"{path} {size:,}" for path, size in list(report.parts.items())[:3])
        logger.warning(
            "%s adds %s bytes to every task; its largest parts: %s. Load them in the function",
            name,
            f"{report.size_bytes:,}",
            parts or name,
        )


def _walk(
    value: Any, path: str, seen: dict[int, Any], depth: int, is_part: bool = True
) -> Iterator[tuple[str, Any, str | None]]:
    """Yields ``(path, object, kind)`` per captured object; ``kind`` is None if it is allowed.

    Allowed objects in large containers are not yielded, because each of them would be pickled.
    """
    if id(value) in seen or depth > _MAX_DEPTH:
        return
    seen[id(value)] = value  # kept alive, so that its id is not reused
    kind = forbidden_kind(value)
    if kind is not None:
        yield path, value, kind
        return
    if depth and is_part:
        yield path, value, None
    if isinstance(value, dict | list | tuple | set | frozenset):
        is_part = is_part and len(value) <= _MAX_SIZED_ITEMS
    for child_path, child in _children(value, path):
        if is_part or type(child) not in _ATOMS:
            yield from _walk(child, child_path, seen, depth + 1, is_part)


def _children(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
        yield f"{path}.__func__", value.__func__
    elif isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        for i, argument in enumerate(value.args):
            yield f"{path}.args[{i}]", argument
        for key, argument in value.keywords.items():
            yield f"{path}.keywords[{key!r}]", argument
    elif isinstance(value, types.FunctionType):
        if not _is_importable(value):
            yield from captured_by(value, path)
    elif isinstance(value, type):
        if not _is_importable(value):
            for name, member in vars(value).items():
                if isinstance(member, types.FunctionType):
                    yield f"{path}.{name}", member
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}[{key!r}]", item
    elif isinstance(value, list | tuple | set | frozenset):
        for i, item in enumerate(value):
            yield f"{path}[{i}]", item
    elif hasattr(value, "__dict__") and not _pickles_itself(value):
        for name, item in vars(value).items():
            yield f"{path}.{name}", item
        yield f"type({path})", type(value)


def _pickles_itself(value: Any) -> bool:
    """Returns whether a class defines its own pickling, as loggers do, and it succeeds."""
    hooks = ("__reduce__", "__reduce_ex__", "__getstate__")
    custom = any(
        getattr(type(value), hook, None) is not getattr(object, hook, None) for hook in hooks
    )
    return isinstance(value, types.ModuleType) or (custom and _pickled_bytes(value) > 0)


def captured_by(function: types.FunctionType, path: str) -> Iterator[tuple[str, Any]]:
    names = function.__code__.co_freevars
    for i, (name, cell) in enumerate(zip(names, function.__closure__ or (), strict=True)):
        try:
            yield f"{path}.__closure__[{i}] -> {name}", cell.cell_contents
        except ValueError:  # a variable that has not been assigned yet
            continue
    for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
        yield f"{path}.__globals__[{name!r}]", function.__globals__[name]
    for i, default in enumerate(function.__defaults__ or ()):
        yield f"{path}.__defaults__[{i}]", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f"{path}.__kwdefaults__[{name!r}]", default


def _global_names(code: types.CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _is_importable(value: Any) -> bool:
    """Returns whether cloudpickle pickles a function or class by name only."""
    if value.__module__ in (None, "__main__") or "<locals>" in value.__qualname__:
        return False
    try:
        found: Any = importlib.import_module(value.__module__)
        for part in value.__qualname__.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return found is value


def forbidden_kind(value: Any) -> str | None:
    """Returns the key in ``_FIXES`` of an object that must not be pickled, else ``None``."""
    for base in type(value).__mro__:
        if base.__module__.startswith("pyspark.") and base.__name__ in _SPARK_CLASSES:
            return base.__name__
        if base.__module__ == "torch.nn.modules.module" and base.__name__ == "Module":
            return "nn.Module"
    if isinstance(value, _LOCKS):
        return "lock"
    if isinstance(value, socket.socket):
        return "socket"
    if isinstance(value, io.IOBase) and not isinstance(value, io.BytesIO | io.StringIO):
        return "open file"
    return None


def _pickled_bytes(value: Any) -> int:
    try:
        return len(cloudpickle.dumps(value))
    except Exception:  # pickling runs the objects' own code
        return 0
