"""Reads what an ONNX file takes, what it returns and which other files it names.

The weights are skipped: reading a file of any size takes milliseconds. Field numbers are those of
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from imagevec.errors import WeightsError
from imagevec.models.weights import GIT_LFS

# The fields of each message that contain tensors, by their number.
_PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"
    },
    "sparse": {1: "tensor", 2: "tensor"},
}  # fmt: skip
_GRAPH, _EXTERNAL = 7, 13
_INITIALIZER, _SPARSE, _INPUT, _OUTPUT = 5, 15, 11, 12

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64"}
_DTYPES |= {8: "string", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}


class Input(NamedTuple):
    """An input of a graph.

    Attributes:
        name: The name.
        dtype: The name of the element type.
        shape: The length of each dimension, ``None`` if it may vary.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def layout(self) -> str:
        """``"NCHW"``, or ``"NHWC"`` if the last dimension has the three channels."""
        is_last = self.shape[-1:] == (3,) and self.shape[1] != 3
        return "NHWC" if is_last else "NCHW"

    @property
    def height_and_width(self) -> tuple[int | None, int | None]:
        height, width = (self.shape[self.layout.index(side)] for side in "HW")
        return height, width

    def __str__(self) -> str:
        sides = ("?" if side is None else str(side) for side in self.shape)
        return f"{self.name}, {self.dtype} ({', '.join(sides)})"


class OnnxFile(NamedTuple):
    """The description of an ONNX file.

    Attributes:
        path: The file.
        inputs: The inputs of the graph that have no default.
        outputs: The names of the outputs.
        external: The other files that contain weights.
    """

    path: Path
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    external: tuple[Path, ...]

    @property
    def image(self) -> Input:
        """The input, if it is the only one."""
        return self.inputs[0]


def read(path: Path) -> OnnxFile:
    """Reads an ONNX file.

    Raises:
        WeightsError: It is not one, it is damaged, or it names files outside its folder or files
            that are missing or too short.
    """
    _check_begin(path)
    try:
        with path.open("rb") as file:
            message = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found = _described(path, message)
    except (ValueError, IndexError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not an ONNX file, or it is damaged or truncated: {error}"
        ) from error
    if not found.inputs or not found.outputs:
        raise WeightsError(f"{path} is not an ONNX file: it has no graph with inputs and outputs")
    return found


def _check_begin(path: Path) -> None:
    pointer, what = GIT_LFS
    with path.open("rb") as file:
        begin = file.read(len(pointer))
    if not begin:
        raise WeightsError(f"{path} is empty")
    if begin == pointer:
        raise WeightsError(f"{path} {what}")
    if begin.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        raise WeightsError(f"{path} is an archive: unpack it, and use the .onnx file in it")


def _described(path: Path, message: memoryview) -> OnnxFile:
    inputs: list[Input] = []
    outputs: list[str] = []
    with_default: set[str] = set()
    for graph in _all(message, _GRAPH):
        for number, part in _messages(graph):
            if number == _INPUT:
                inputs.append(_input(part))
            elif number == _OUTPUT:
                outputs.append(_text(part, 1))
            elif number == _INITIALIZER:
                with_default.add(_text(part, 8))
            elif number == _SPARSE:
                with_default.update(_text(values, 8) for values in _all(part, 1))
    needed_bytes: dict[str, int] = {}
    for location, end in _external(message, "model"):
        needed_bytes[location] = max(end, needed_bytes.get(location, 0))
    external = tuple(_inside(path, name, size) for name, size in sorted(needed_bytes.items()))
    return OnnxFile(
        path, tuple(x for x in inputs if x.name not in with_default), tuple(outputs), external
    )


def _input(message: memoryview) -> Input:
    dtype, shape = 0, []
    for type_ in _all(message, 2):
        for tensor in _all(type_, 1):
            dtype = _number(tensor, 1)
            for dims in _all(tensor, 2):
                sides = (_number(dim, 1) for dim in _all(dims, 1))
                shape = [side if 0 < side < 1 << 63 else None for side in sides]
    return Input(_text(message, 1), _DTYPES.get(dtype, f"type {dtype}"), tuple(shape))


def _external(message: memoryview, kind: str) -> Iterator[tuple[str, int]]:
    """Yields the location and the end, in bytes, of the values of each tensor in another file."""
    if kind == "tensor":
        pairs = [(_text(entry, 1), _text(entry, 2)) for entry in _all(message, _EXTERNAL)]
        end = sum(int(value) for key, value in pairs if key in ("offset", "length"))
        yield from ((value, end) for key, value in pairs if key == "location")
        return
    for number, part in _messages(message):
        if number in _PARTS[kind]:
            yield from _external(part, _PARTS[kind][number])


def _inside(path: Path, location: str, needed_bytes: int) -> Path:
    """Returns the path of external data.

    Links may lead out of the folder only as the link to the model itself does: in the cache of the
    Hugging Face hub, both are links to files of one folder.
    """
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    is_path = PureWindowsPath(location).anchor or "*" in location  # "*" marks memory, not a file
    data = path.parent / location
    real = data.resolve()
    folders = (path.parent.resolve(), path.resolve().parent)
    if is_path or ".." in parts or not any(map(real.is_relative_to, folders)):
        raise WeightsError(f"{path} is not valid: it names a file outside its folder, {location!r}")
    if not data.is_file():
        raise WeightsError(f"{path} needs {location!r} in its folder: copy both files")
    _check_begin(data)
    size_bytes = os.path.getsize(data)
    if size_bytes < needed_bytes:
        raise WeightsError(f"{data} is truncated: it has {size_bytes:,} of {needed_bytes:,} bytes")
    return data


def _text(message: memoryview, number: int) -> str:
    *_, last = b"", *_all(message, number)  # the last one counts, as in every parser
    return bytes(last).decode()


def _number(message: memoryview, number: int) -> int:
    *_, last = 0, *(x for n, x in _fields(message) if n == number and isinstance(x, int))
    return last


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    return (part for n, part in _messages(message) if n == number)


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    return ((n, part) for n, part in _fields(message) if isinstance(part, memoryview))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields the number and value of each field: https://protobuf.dev/programming-guides/encoding.

    Raises:
        ValueError, IndexError: The message is not valid.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        key &= 0xFFFFFFFF
        kind = key & 7
        length = {1: 8, 5: 4}.get(kind, 0)
        if kind in (0, 2):
            value, position = _varint(message, position)
            if kind == 0:
                yield key >> 3, value
                continue
            length = value
        elif not length:
            raise ValueError(f"no field begins at byte {position} of a message")
        if position + length > len(message):
            raise ValueError(f"{position + length - len(message):,} bytes are missing")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise ValueError(f"a number before byte {position} of a message does not end")
