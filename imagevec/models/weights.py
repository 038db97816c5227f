"""The file of a ``weights`` option: a local path, a URI, or the index of a sharded checkpoint.

This module does not import PyTorch. ``checkpoints`` reads the tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from imagevec import cache
from imagevec.errors import FingerprintError, OptionError, ReadError, WeightsError
from imagevec.files import digest_of
from imagevec.options import RANDOM, WEIGHTS_SUFFIXES, names_file
from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.retry import retried
from imagevec.storage.stores import Entry, store_of

INDEX_SUFFIX = ".index.json"

_HEAD_BYTES = 512
_PART_BYTES = 1 << 20
_STALLED_SECONDS = 120  # without a part of a download
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors

_ZIP = b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x00-\x05]")

GIT_LFS = (
    b"version https://git-lfs",
    "is a Git LFS pointer, not the file: run 'git lfs pull' there",
)

# What else is passed as weights, by the first bytes.
_OTHERS = (
    GIT_LFS,
    (rb"\s*(?:\xef\xbb\xbf)?\s*<[!?a-zA-Z]", "is a web page or XML, not the file that it links to"),
    (rb"\s*[{\[]", "is JSON: pass the file of weights, or an index that ends in .index.json"),
    (rb"\x89HDF\r\n", "is an HDF5 file, of Keras or TensorFlow"),
    (rb"\x08.\x12", "is an ONNX model: pass it as model"),
    (rb"[\x81-\x8f][\xa0-\xbf]|\xde..[\xa0-\xbf]", "is a msgpack file, of Flax"),
    (rb".{4}TFL3", "is a TensorFlow Lite model"),
    (rb"GGUF", "is a GGUF file"),
    (rb"\x93NUMPY", "is a NumPy array"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is compressed: unpack it"),
    (rb".{257}ustar", "is a tar archive: unpack it"),
    (rb"\x00{64}", "is empty but for zeros: download it again"),
)


def local_file(model_name: str, option: str) -> Path | None:
    """Returns the file of a ``weights`` option that names one, or ``None`` for ``"random"``.

    Raises:
        OptionError: The option is neither.
        WeightsError: The file does not exist, or cannot be read.
    """
    if option == RANDOM:
        return None
    if not names_file(option):
        raise OptionError(
            f"weights={option!r} is not known for {model_name!r}: "
            f"use 'DEFAULT', 'random', or a path that ends in {', '.join(WEIGHTS_SUFFIXES)}"
        )
    return weights_file(option)


def weights_file(option: str) -> Path:
    """Returns the local file of a path or URI.

    A URI is downloaded into the user's cache, unless its store reports the size and time of a
    version that is there. The shards of an index are joined there in one safetensors file.

    Raises:
        WeightsError: The file does not exist, or cannot be read.
    """
    location = Location.of(option).existing()
    if location.name.endswith(INDEX_SUFFIX):
        return _joined(location)
    return _existing(location) if location.is_local else _downloaded(location)


def option_of(model: str, weights: str) -> str:
    """Returns the ``weights`` option of a ``FeatureSpec``, from the plans and files in the cache.

    Args:
        model: ``FeatureSpec.model``.
        weights: ``FeatureSpec.weights``.

    Raises:
        FingerprintError: ``weights`` is not valid.
    """
    if weights == RANDOM:
        return RANDOM
    digest = weights.removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digest):  # a pattern would choose any file of the cache
        raise FingerprintError(f"the weights {weights!r} of the table are not valid")
    option = cache.weights_option(model, weights) or "DEFAULT"
    if names_file(option):
        with contextlib.suppress(WeightsError):  # it was deleted or moved
            if digest_of(weights_file(option)) == digest:
                return option  # the files next to it count, too
    elif option != "DEFAULT":
        return option
    return str(cache.find(digest) or "DEFAULT")


def check_is_weights(path: Path, name: str = "") -> bytes:
    """Returns the first bytes of a file after comparing them with those of other kinds of files.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        WeightsError: The file cannot contain weights. The message says what it is.
    """
    name = name or path.name
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise WeightsError(f"{name} is not a weights file: it is empty (0 bytes)")
    if is_safetensors(head) or head.startswith(_ZIP) or _PICKLE.match(head):
        return head
    for pattern, kind in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            raise WeightsError(f"{name} is not a weights file: it {kind}")
    raise WeightsError(
        f"{name} is not a weights file: it begins with {head[:8]!r}, which neither PyTorch nor "
        "safetensors writes"
    )


def is_safetensors(head: bytes) -> bool:
    """Returns whether a file with these first bytes is a safetensors file."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES


def _existing(location: Location) -> Path:
    path = Path(location.path)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if names_file(entry.name))
        inside = f", for example {names[0]}" if names else ""
        raise WeightsError(f"weights={location.path!r} is a folder: pass a file in it{inside}")
    if not path.is_file():
        raise WeightsError(f"weights={location.path!r}: no such file")
    if not os.access(path, os.R_OK):
        raise WeightsError(f"weights={location.path!r}: permission denied")
    return path


def _downloaded(location: Location) -> Path:
    entry = _entry(location)
    suffix = re.search(r"\.\w{1,16}$", location.name)
    name = f"weights{suffix[0] if suffix else '.pth'}"
    return _cached(_version(entry), lambda folder: _download(location, entry, folder / name))


def _version(entry: Entry) -> Any:
    """Returns what determines a file's content in its store, as JSON, or ``None``."""
    return None if entry.modified is None else [entry.path, entry.length, entry.modified]


def _cached(version: Any, make: Callable[[Path], Path]) -> Path:
    """Returns the cached file of a version, made in a temporary folder if it is new.

    Args:
        version: What determines the file's content, as JSON; ``None`` if that is unknown.
        make: A function that writes the file to a folder and returns its path.
    """
    text = json.dumps(["weights", version])
    key = hashlib.sha256(text.encode()).hexdigest()
    record = cache.recall(key) if version is not None else None
    if record is not None:
        return cache.stored(record["files"][0])
    with cache.temporary_folder() as folder:
        path = cache.store(make(folder), move=True)
    if version is not None:
        cache.remember(key, {"files": [path.name]})
    return path


def _download(location: Location, entry: Entry, path: Path) -> Path:
    """Downloads a file, continues after failed reads, and checks its length and content."""
    source = _Resumable(location)
    with path.open("wb") as target:
        while part := _read(location, source.read):
            target.write(part)
    size = path.stat().st_size
    if entry.length not in (0, size):
        raise WeightsError(f"weights={str(location)!r}: got {size} of {entry.length} bytes")
    if not path.name.endswith(".json"):
        check_is_weights(path, str(location))
    return path


class _Resumable:
    """A file of a store that is reopened where a failed read left it."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._file: Any = None
        self._position = 0

    def read(self) -> bytes:
        try:
            if self._file is None:
                self._file = store_of(self._location).open(self._location)
                self._file.seek(self._position)
            read = getattr(self._file, "read1", self._file.read)  # a failed read loses its bytes
            part: bytes = read(_PART_BYTES)
        except BaseException:
            self._file = None
            raise
        self._position += len(part)
        return part


def _entry(location: Location) -> Entry:
    entry: Entry = _read(location, lambda: store_of(location).entry(location))
    if entry.kind != "file":
        raise WeightsError(f"weights={str(location)!r} is a folder: pass a file in it")
    return entry


def _read(location: Location, action: Callable[[], Any]) -> Any:
    try:
        return retried(location, action, _STALLED_SECONDS)
    except FileNotFoundError as error:
        raise WeightsError(f"weights={str(location)!r}: no such file") from error
    except (ReadError, UnsupportedURIError, OSError, ValueError) as error:
        raise WeightsError(f"weights={str(location)!r}: {error}") from error


def _joined(index: Location) -> Path:
    """Returns the cached file with the tensors of all shards of an index.

    The index is Hugging Face's: ``weight_map`` maps each key to a file of the same folder.
    """
    file = _existing(index) if index.is_local else _downloaded(index)
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of shards: it has no weight_map") from error
    if not names:
        raise WeightsError(f"{index} is not an index of shards: its weight_map is empty")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise WeightsError(f"{index} names the shard {name!r}, not a file beside it")
    folder = index.path.rpartition("/")[0]
    shards = [index.sibling(f"{folder}/{name}") for name in names]
    if index.is_local:
        files = [_existing(shard) for shard in shards]
        digests = [digest_of(path) for path in files]
        return _cached([digest_of(file), *digests], lambda folder: _join(files, folder))
    entries = [_entry(shard) for shard in shards]
    versions = [_version(entry) for entry in entries]

    def downloaded(folder: Path) -> Iterator[Path]:
        for shard, entry in zip(shards, entries, strict=True):
            yield _download(shard, entry, folder / shard.name)

    version = None if None in versions else [digest_of(file), *versions]
    return _cached(version, lambda folder: _join(downloaded(folder), folder))


def _join(shards: Iterable[Path], folder: Path) -> Path:
    """Writes the tensors of all shards to one file. One shard at a time is in memory."""
    from imagevec.models.checkpoints import as_safetensors

    files = [as_safetensors(shard, folder / f"{n}.safetensors") for n, shard in enumerate(shards)]
    headers, starts, position = {}, [], 0
    for file in files:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        for key, tensor in header.items():
            begin, end = tensor["data_offsets"]
            headers[key] = {**tensor, "data_offsets": [position + begin, position + end]}
        starts.append(8 + length)
        position += file.stat().st_size - 8 - length
    text = json.dumps(headers).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "weights.safetensors"
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for file, start in zip(files, starts, strict=True):
            with file.open("rb") as source:
                source.seek(start)
                while part := source.read(_PART_BYTES):
                    target.write(part)
    return path
