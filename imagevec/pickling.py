"""Functions that run on workers: what they capture, and how they are pickled.

Spark pickles a UDF with everything it captures through its closure, ``self`` or global names. A
captured SparkSession then fails with CONTEXT_ONLY_VALID_ON_DRIVER (SPARK-5063), and a captured
model is copied into every task. This module finds such objects before a job starts and reports the
path to each. It does not import Spark: it recognises objects by the names of their classes.

Spark also pickles the functions of a module by name, although workers may lack the module, or have
another version of it. ``dumps`` pickles the code of modules that are not installed.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import importlib.machinery
import importlib.util
import io
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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

# Wherever they are installed: a module of Spark may be in a zip, PyTorch built from its source.
_LIBRARIES = frozenset(
    {"cloudpickle", "imagevec", "numpy", "open_clip", "py4j", "pyspark", "timm", "torch"}
    | {"torchvision", "transformers"}
)
_INSTALLED = frozenset({"site-packages", "dist-packages"})  # the second is Debian's
_STDLIB = os.path.dirname(os.__file__)

_pickle_lock = threading.RLock()  # cloudpickle's registry of modules belongs to the whole process


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
    return _explain(function, name, by_value=False)


def _explain(function: Callable[..., object], name: str, by_value: bool) -> PickleReport:
    found = list(_walk(function, name, {}, 0, by_value))
    problems = tuple(
        CapturedObject(path, kind, _FIXES[kind]) for path, _, kind in found if kind is not None
    )
    try:
        size_bytes, error = len(_dumps(function, by_value)), None
    except Exception as raised:  # pickling runs the objects' own code
        size_bytes, error = None, f"{type(raised).__name__}: {raised}"
    if by_value and size_bytes is not None and size_bytes <= _LARGE_BYTES:
        found = []  # nobody reads the sizes of the parts, each of which would be pickled
    sizes = {path: _pickled_bytes(x, by_value) for path, x, kind in found if kind is None}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    return PickleReport(size_bytes, problems, dict(largest), error)


def check_pickle(function: Callable[..., object]) -> None:
    """Checks that workers can load a function, and logs a warning if the pickle exceeds 1 MB.

    Raises:
        SerializationError: The function captures objects that must not be pickled. The message
            gives the path to each of them and the fix. Or it needs a module that is not installed
            and can neither be pickled by value nor be found where workers look for modules.
    """
    name = getattr(function, "__name__", "factory").replace("<lambda>", "factory")
    report = _explain(function, name, by_value=True)
    try:
        _check_report(report, name)
    except SerializationError as error:
        report = _explain(function, name, by_value=False)
        _check_report(report, name)
        if missing := [module for module in _modules_of(function) if not _is_on_workers(module)]:
            file = getattr(sys.modules[missing[0]], "__file__", None)
            raise SerializationError(
                f"workers may lack the module {missing[0]!r}, and it cannot be pickled: {error}. "
                f"Or send it to the workers: spark.sparkContext.addPyFile({file!r})"
            ) from error
    if cast(int, report.size_bytes) > _LARGE_BYTES:
        parts = ", ".join(f"{path} {size:,}" for path, size in list(report.parts.items())[:3])
        logger.warning(
            "%s adds %s bytes to every task; its largest parts: %s. Load them in the function",
            name,
            f"{report.size_bytes:,}",
            parts or name,
        )


def _check_report(report: PickleReport, name: str) -> None:
    if report.problems:
        raise SerializationError("; ".join(map(str, report.problems)))
    if report.size_bytes is None:
        raise SerializationError(f"{name} cannot be pickled: {report.error}")


def dumps(function: Callable[..., object]) -> bytes:
    """Pickles a function for ``loads``, with the code that is not installed.

    Functions and classes of modules that are not installed are pickled by value, as cloudpickle
    does with those of ``__main__``: workers need no such module, and if they have one, they run the
    code of this process. If that is not possible, modules are pickled by name.
    """
    if not any(kind for _, _, kind in _walk(function, "", {}, 0, by_value=True)):
        with contextlib.suppress(Exception):  # pickling runs the objects' own code
            return _dumps(function, by_value=True)
    return _dumps(function, by_value=False)


def loads(data: bytes) -> Any:
    """Returns the function that ``dumps`` pickled.

    Raises:
        SerializationError: This process lacks a module.
    """
    unpickler = pickle.Unpickler(io.BytesIO(data))
    try:
        function = unpickler.load()
        with contextlib.suppress(EOFError):  # nothing follows what was pickled by name
            while members := unpickler.load():
                for owner, name, value in members:
                    is_module = isinstance(owner, types.ModuleType)
                    (vars(owner) if is_module else owner.__globals__)[name] = value
            for module in unpickler.load():
                if not _can_be_imported(module.__name__):
                    sys.modules[module.__name__] = module
    except ModuleNotFoundError as error:
        raise SerializationError(f"the factory needs {missing_module(error)}") from error
    return function


def missing_module(error: ModuleNotFoundError) -> str:
    """Returns the rest of a sentence on a worker that needs something."""
    return (
        f"a module that this process lacks ({error}): install it on the workers, or send its file "
        "to them with spark.sparkContext.addPyFile"
    )


def _dumps(function: Any, by_value: bool) -> bytes:
    if not by_value:
        return cast(bytes, cloudpickle.dumps(function))
    try:
        return _dumps_by_value(function, careful=False)
    except _CompiledError:
        raise
    except Exception:  # of a member that may not be needed
        return _dumps_by_value(function, careful=True)


def _dumps_by_value(function: Any, careful: bool) -> bytes:
    with _pickle_lock, io.BytesIO() as file, contextlib.ExitStack() as registered:
        pickler = _Pickler(file, registered, careful)
        pickler.dump(function)
        while members := list(pickler.new_members()):
            pickler.dump(members)
        pickler.dump([])
        pickler.dump(list(pickler.imported.values()))
        return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles functions and classes by value, unless they are installed.

    cloudpickle pickles a module by name, or with everything in it. This pickler makes an empty
    module in its place. Its members follow, those that the functions name.

    Args:
        file: The file to write to.
        registered: Ends the registration of modules at cloudpickle, which is global.
        careful: Whether to leave out what cannot be pickled of the members of modules.

    Attributes:
        imported: The modules that the functions import when they run, by name.
    """

    def __init__(
        self, file: io.BytesIO, registered: contextlib.ExitStack, careful: bool = False
    ) -> None:
        super().__init__(file)
        self.imported: dict[str, types.ModuleType] = {}
        self._functions: dict[int, types.FunctionType] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._sent: set[tuple[int, str]] = set()
        self._registered = registered
        self._careful = careful

    def reducer_override(self, value: Any) -> Any:
        is_module = isinstance(value, types.ModuleType)
        module = value.__name__ if is_module else getattr(value, "__module__", None)
        if not isinstance(module, str) or is_installed(module):
            return super().reducer_override(value)
        if isinstance(value, types.FunctionType):
            self._add(value)
        elif _is_compiled(module):
            raise _CompiledError(f"the module {module!r} is compiled")
        elif is_module:
            self._modules[module] = value
            return _Module, (module,)
        self._register(module)
        return super().reducer_override(value)

    def _register(self, name: str) -> None:
        module = sys.modules.get(name)
        is_known = name in cloudpickle.list_registry_pickle_by_value()
        if module is not None and module.__name__ == name and not is_known:
            cloudpickle.register_pickle_by_value(module)
            self._registered.callback(cloudpickle.unregister_pickle_by_value, module)

    def _add(self, function: types.FunctionType) -> None:
        self._functions[id(function)] = function
        for module in imported_by(function):
            self._modules[module.__name__] = self.imported[module.__name__] = module

    def new_members(self) -> Iterator[tuple[Any, str, Any]]:
        """Yields modules and functions, with the names and values that they need and still lack."""
        named = set[str]().union(*(names_in(f.__code__) for f in self._functions.values()))
        for module in self._modules.values():
            for name in sorted(named & vars(module).keys()):
                value = vars(module)[name]
                is_wanted = self._is_new(module, name) and forbidden_kind(value) is None
                if is_wanted and (not self._careful or _can_be_carried(value)):
                    yield module, name, value
        for function in list(self._functions.values()):
            # cloudpickle overlooks the globals in the bodies of classes.
            for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
                if self._is_new(function, name):
                    yield function, name, function.__globals__[name]

    def _is_new(self, owner: Any, name: str) -> bool:
        is_new = (id(owner), name) not in self._sent
        self._sent.add((id(owner), name))
        return is_new


class _CompiledError(pickle.PicklingError):
    """Something belongs to a C extension that is not installed."""


class _Module(types.ModuleType):
    """A module that was pickled by value. A real one of its name, if any, has the other members."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        real = importlib.import_module(self.__name__)
        if isinstance(real, _Module):
            raise ModuleNotFoundError(f"No member {name!r} of {self.__name__!r}")
        return getattr(real, name)


def _can_be_imported(name: str) -> bool:
    """Returns whether there is a module that was not pickled by value."""
    if name in sys.modules:
        return not isinstance(sys.modules[name], _Module)
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def _can_be_carried(value: Any) -> bool:
    """Returns whether a member of a module can be pickled. A function may not need all it names.

    Raises:
        _CompiledError: It belongs to a C extension.
    """
    if any(kind for _, _, kind in _walk(value, "", {}, 0, by_value=True)):
        return False
    with contextlib.ExitStack() as stack:
        try:
            _Pickler(io.BytesIO(), stack).dump(value)
        except _CompiledError:
            raise
        except Exception:  # pickling runs the objects' own code
            return False
    return True


def _is_compiled(module: str) -> bool:
    """Returns whether a module is a C extension."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return file.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


def _modules_of(function: Any) -> list[str]:
    """Returns the modules that are not installed and that cloudpickle pickles by name."""
    found = [function, *(value for _, value, _ in _walk(function, "", {}, 0))]
    named = [x for x in found if isinstance(x, types.FunctionType | type) and _is_importable(x)]
    names = {x.__module__ for x in named}
    names |= {x.__name__ for x in found if isinstance(x, types.ModuleType)}
    return sorted(name for name in names - {"__main__"} if not is_installed(name))


def _is_on_workers(module: str) -> bool:
    """Returns whether a module was sent with ``addPyFile``, or a new process would find it."""
    name = module.partition(".")[0]
    sent = [entry for entry in sys.path if "userFiles-" in entry]  # Spark's folder
    if importlib.machinery.PathFinder.find_spec(name, sent) is not None:
        return True
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.abspath(os.sep), check=False)
    return done.returncode == 0


def is_installed(module: str | None) -> bool:
    """Returns whether a module belongs to Python or to an installed package."""
    found = sys.modules.get(module or "")
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), "")
    return _is_installed_at(module or "", file)


def _is_installed_at(module: str, file: str) -> bool:
    top = module.partition(".")[0]
    if top == "__main__":
        return False
    if top in _LIBRARIES:
        return True
    if top in sys.stdlib_module_names:  # unless a script's own file has its name
        return file.startswith(_STDLIB) or not file.endswith(".py")
    return not _INSTALLED.isdisjoint(Path(file).parts)


def imported_by(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """Yields the modules that a function imports when it runs, unless they are installed.

    They are imported now. Modules whose names are computed are not found.
    """
    package = function.__globals__.get("__package__") or ""
    for name, level, items in _import_statements(function.__code__):
        with contextlib.suppress(Exception, SystemExit):  # it is missing, or its code fails
            base = importlib.util.resolve_name("." * level + name, package)
            yield from _own_modules(base)
            for item in items or ():
                with contextlib.suppress(Exception, SystemExit):  # not a module
                    yield from _own_modules(f"{base}.{item}")


def _import_statements(code: types.CodeType) -> Iterator[tuple[str, int, tuple[str, ...] | None]]:
    """Yields ``(module, level, items)`` per import in a function and those nested in it."""
    steps = [x for x in dis.get_instructions(code) if x.opname not in ("CACHE", "EXTENDED_ARG")]
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            yield step.argval, steps[i - 2].argval, steps[i - 1].argval
    for nested in _nested(code):
        yield from _import_statements(nested)


def _own_modules(name: str) -> Iterator[types.ModuleType]:
    """Yields a module that is not installed, after the packages that contain it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        if part not in sys.modules:
            spec = importlib.util.find_spec(part)
            if spec is None:
                return
            file = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
            if _is_installed_at(part, file):
                return
            importlib.import_module(part)
        if is_installed(part):
            return
        yield sys.modules[part]


def names_in(code: types.CodeType) -> set[str]:
    """Returns the names in a function and those nested in it, as in ``module.name``.

    Texts may be names, too, as in ``getattr(module, "name")``.
    """
    texts = {x for x in code.co_consts if isinstance(x, str) and x.isidentifier()}
    names = texts.union(code.co_names, *map(names_in, _nested(code)))
    return {name for name in names if not name.startswith("__")}


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _walk(
    value: Any,
    path: str,
    seen: dict[int, Any],
    depth: int,
    by_value: bool = False,
    is_part: bool = True,
) -> Iterator[tuple[str, Any, str | None]]:
    """Yields ``(path, object, kind)`` per captured object; ``kind`` is None if it is allowed.

    Allowed objects in large containers are not yielded, because each of them would be pickled.
    ``by_value`` also looks into functions and classes of modules that are not installed.
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
    for child_path, child in _children(value, path, by_value):
        if is_part or type(child) not in _ATOMS:
            yield from _walk(child, child_path, seen, depth + 1, by_value, is_part)


def _children(value: Any, path: str, by_value: bool) -> Iterator[tuple[str, Any]]:
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
        if not _is_importable(value, by_value):
            yield from captured_by(value, path)
    elif isinstance(value, type):
        if not _is_importable(value, by_value):
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
    reads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")  # in bodies of classes, too
    names = {step.argval for step in dis.get_instructions(code) if step.opname in reads}
    return names.union(*map(_global_names, _nested(code))) - {"__name__"}


def _is_importable(value: Any, by_value: bool = False) -> bool:
    """Returns whether a function or class is pickled by name only."""
    if value.__module__ in (None, "__main__") or "<locals>" in value.__qualname__:
        return False
    if by_value and not is_installed(value.__module__):
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


def _pickled_bytes(value: Any, by_value: bool = False) -> int:
    try:
        return len(_dumps(value, by_value))
    except Exception:  # pickling runs the objects' own code
        return 0
