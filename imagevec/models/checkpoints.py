"""Reads the tensors of checkpoints. Nothing in them runs, and no object but tensors is built.

``torch.load`` reads PyTorch's files with ``weights_only=True``. Of the Python objects that training
scripts store beside tensors, those that are known by name are read as empty objects, and all others
are refused. TorchScript archives have a reader here, because ``torch.jit.load`` runs code in them.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from imagevec.errors import WeightsError
from imagevec.models.weights import check_is_weights, is_safetensors

# What training scripts store in checkpoints: arguments, paths, times, configurations.
_OBJECTS = (
    *("argparse.Namespace", "types.SimpleNamespace", "typing.Any", "uuid.UUID", "builtins.slice"),
    *("decimal.Decimal", "fractions.Fraction", "builtins.range"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"{module}.{pure}{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("", "Posix", "Windows")
    ),
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct", "_frombuffer")
    ),
    *(
        f"numpy.dtypes.{name}DType"
        for name in ("Bool", "Bytes", "Str", "Object", "Complex64", "Complex128")
    ),
    *(f"numpy.dtypes.{kind}{bits}DType" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    *(f"numpy.dtypes.Float{bits}DType" for bits in (16, 32, 64)),
    *(f"numpy.{name}" for name in ("bool", "bool_", "float16", "float32", "float64")),
    *(f"numpy.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "torch.torch_version.TorchVersion",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",  # keys of callbacks before 1.5
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
)
_MAPPINGS = (
    *("addict.addict.Dict", "easydict.EasyDict", "munch.Munch", "yacs.config.CfgNode"),
    *("ml_collections.config_dict.config_dict.ConfigDict", "mmengine.config.config.ConfigDict"),
    *(
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
    ),
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_BUILTINS = (bool, bytes, dict, float, frozenset, int, list, str, tuple)

_OLD_FORMAT = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # before PyTorch 1.6

_SCRIPT_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint, on the CPU and where possible from a memory map.

    Returns:
        The tensors by their path in nested containers: ``"state_dict.conv1.weight"``. Other keys
        than strings, such as those of an optimizer's state, are left out.

    Raises:
        WeightsError: The file contains no tensors, or objects that only code could restore. The
            message says what it is.
    """
    head = check_is_weights(path)
    try:
        loaded = _read(path, head)
    except WeightsError:
        raise
    except Exception as error:  # corrupt bytes raise arbitrary exceptions
        raise WeightsError(f"{path.name} is not a weights file: {_why(path, error)}") from error
    tensors = dict(_flattened(loaded, (), set()))
    if not tensors:
        raise WeightsError(
            f"{path.name} is not a weights file: it contains {_described(loaded)}, but no "
            "state_dict"
        )
    return tensors


def as_safetensors(path: Path, target: Path) -> Path:
    """Returns a file's tensors as a safetensors file, which is ``target`` if it is another kind."""
    from safetensors.torch import save_file

    if is_safetensors(check_is_weights(path)):
        return path
    tensors = read_tensors(path)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, target)
    return target


def _read(path: Path, head: bytes) -> Any:
    if is_safetensors(head):
        from safetensors.torch import load_file

        return load_file(path)
    is_zip = head.startswith(b"PK")
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            script = _script_folder(path, archive)
            if script is not None:
                return _Script(archive, script).load()
    with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
        warnings.simplefilter("ignore")  # of unusual pickle protocols
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _stand_ins() -> list[Any]:
    """Returns what ``torch.load`` builds in place of known objects, under their names."""
    return [
        *(_named(name, _Object) for name in _OBJECTS),
        *(_named(name, _Mapping) for name in _MAPPINGS),
        _named("collections.defaultdict", _Mapping),
        _named("collections.deque", _Sequence),
        *_BUILTINS,
    ]


def _named(name: str, kind: type) -> type:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (kind,), {"__module__": module})


class _Object:
    """An object without the content of the one in the file."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Object:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping:
    """Becomes an ``OrderedDict``, whose items and attributes ``torch.load`` sets."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


class _Sequence:
    """Becomes a list."""

    def __new__(cls, *arguments: Any) -> Any:
        return []


def _flattened(
    value: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors in nested containers. A container that occurs twice is yielded once."""
    if isinstance(value, torch.Tensor) and path:
        yield ".".join(path), value.detach()
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, _ScriptObject):
        items = value.attributes.items()
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, item in items:
        if isinstance(key, str):
            yield from _flattened(item, (*path, key), seen)


def _described(loaded: Any) -> str:
    if isinstance(loaded, Mapping):
        return f"the keys {', '.join(map(repr, list(loaded)[:5])) or '(none)'}"
    if isinstance(loaded, _ScriptObject):
        return "a TorchScript module without parameters, perhaps of torch.jit.freeze"
    return f"a {type(loaded).__name__}"


def _why(path: Path, error: Exception) -> str:
    """Explains why a file cannot be read, without the advice to run what is in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(32)
    if is_safetensors(head) or (head.startswith(b"PK") and not zipfile.is_zipfile(path)):
        return f"it is damaged or ends early, after {size} bytes"
    names, texts = _names_and_texts(path)
    is_of_torch = head.startswith(b"PK") or _OLD_FORMAT in head
    if not is_of_torch or "torch.storage._load_from_bytes" in names:
        return "it was written by pickle, not by torch.save: use torch.save(state_dict, path)"
    if "Unsupported operand" in str(error):
        return (
            "it was saved with another pickle_protocol than torch.save's default: save it again "
            "without that argument"
        )
    modules = [name for name in names if name.startswith("torch.nn.modules.")]
    code = [name for name in names if name not in _known_names()]
    if modules and "_parameters" in texts:
        return (
            f"it is a pickled module ({[*code, *modules][0]}), which only code could restore: save "
            "model.state_dict() in place of the model"
        )
    if code:
        return (
            f"it contains Python objects ({', '.join(code[:3])}), which only code could restore: "
            "save the state_dict only"
        )
    return f"it is damaged or ends early, after {size} bytes"


def _known_names() -> set[str]:
    import torch._weights_only_unpickler as unpickler

    stand_ins = (f"{kind.__module__}.{kind.__qualname__}" for kind in _stand_ins())
    return {*unpickler._get_allowed_globals(), *stand_ins}


def _names_and_texts(path: Path) -> tuple[list[str], set[str]]:
    """Returns the classes and functions in a file's pickles, in order, and the other texts."""
    names: list[str] = []
    texts: set[str] = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Exception))  # the end of what is readable
        stream = stack.enter_context(path.open("rb"))
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            stream = io.BufferedReader(io.BytesIO(archive.read(inside)))
        while True:  # PyTorch's old format has several pickles
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif isinstance(argument, str):
                    texts.add(argument)
    python_3 = (re.sub("^(__builtin__|copy_reg)", _renamed, name) for name in names)
    return list(dict.fromkeys(python_3)), texts


def _renamed(match: re.Match[str]) -> str:
    return {"__builtin__": "builtins", "copy_reg": "copyreg"}[match[0]]


def _script_folder(path: Path, archive: zipfile.ZipFile) -> str | None:
    """Returns the folder of a TorchScript archive, or ``None`` for a file of ``torch.save``.

    Raises:
        WeightsError: It is another kind of archive.
    """
    names = set(archive.namelist())
    pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if pickles:
        folder = pickles[0].removesuffix("data.pkl")
        return folder if f"{folder}constants.pkl" in names else None
    if any(
        name.endswith(("models/model.json", "serialized_exported_program.json")) for name in names
    ):
        kind = "an exported program of torch.export: pass a .pt2 file as model"
    elif any(name.endswith(".npy") for name in names):
        kind = "an archive of NumPy arrays"
    elif any(name.endswith(".weights.h5") for name in names):
        kind = "a model of Keras"
    else:
        kind = f"a zip archive of {', '.join(sorted(names)[:3]) or 'nothing'}: unpack it"
    raise WeightsError(f"{path.name} is not a weights file: it is {kind}")


class _ScriptObject:
    """A module of a TorchScript archive: its attributes without its code."""

    attributes: Mapping[str, Any] = {}

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _Script(pickle.Unpickler):
    """Reads the attributes of a TorchScript archive.

    The names in the pickle refer to the functions and classes that ``find_class`` makes for this
    one file, so that it can neither run nor change anything else.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _SCRIPT_DTYPES:
            return type(name, (), {"dtype": _SCRIPT_DTYPES[name]})
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *rest: storage.as_strided(
                size, stride, offset
            )
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *rest: tensor
        return type(name, (_ScriptObject,), {})

    def persistent_load(self, saved_id: Any) -> torch.Tensor:
        _, kind, key, _, count = saved_id
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            flat = torch.frombuffer(data, dtype=kind.dtype) if count else torch.empty(0)
            self._storages[key] = flat
        return self._storages[key]
