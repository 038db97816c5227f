"""Small graphs in ONNX files, and what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagevec import Preprocessing

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FLOAT, UINT8, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16
DOUBLE, INT64 = onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, shape)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op, inputs.split(), output.split(), **attributes)


def write(
    path: Path,
    nodes: list[Any],
    tensors: dict[str, np.ndarray],
    *,
    shape: Any = (None, 3, 32, 32),
    dtype: int = FLOAT,
    outputs: Any = (("features", (None, 6)),),
    out_dtype: int = FLOAT,
    inputs: tuple[str, ...] = ("images",),
    opset: int = 17,
    **options: Any,
) -> Path:
    """Writes a graph of these nodes, whose first input is the images."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [info(name, dtype, shape) for name in inputs],
        [info(name, out_dtype, sides) for name, sides in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("mine", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, path, **options)
    return path


def network(path: Path, *, dtype: int = FLOAT, layout: str = "NCHW", **options: Any) -> Path:
    """Writes a small CNN whose vectors have six numbers, in the type of the input."""
    real = np.float16 if dtype == HALF else np.float32
    first = [node("Identity", "images", "x")]
    if layout == "NHWC":
        first = [node("Transpose", "images", "x", perm=[0, 3, 1, 2])]
    if dtype == UINT8:
        first += [node("Cast", "x", "real", to=FLOAT), node("Div", "real by", "y")]
    else:
        first += [node("Cast", "x", "y", to=HALF if dtype == HALF else FLOAT)]
    out_dtype = FLOAT if dtype == UINT8 else dtype
    nodes = [
        *first,
        node("Conv", "y kernel", "maps", strides=[4, 4]),
        node("Relu", "maps", "relu"),
        node("AveragePool", "relu", "means", kernel_shape=[1, 7]),
        node("Flatten", "means", "flat"),
        node("MatMul", "flat matrix", "products"),
        node("Cast", "products", "features", to=out_dtype),
    ]
    tensors = {"kernel": weights(8, 3, 5, 5), "matrix": weights(8 * 7, 6)}
    tensors |= {"by": np.array(100.0)} if dtype == UINT8 else {}
    shape = (None, 32, 32, 3) if layout == "NHWC" else (None, 3, 32, 32)
    return write(
        path,
        nodes,
        {name: value.astype(real) for name, value in tensors.items()},
        **{"shape": shape, "dtype": dtype, "out_dtype": out_dtype, **options},
    )


def expected_of(
    path: Path, images: np.ndarray, preprocessing: Preprocessing, output: str = "features"
) -> np.ndarray:
    """Runs ONNX Runtime for each image, uint8 ``(N, H, W, 3)``."""
    session = onnxruntime.InferenceSession(path)
    (taken,) = session.get_inputs()
    if taken.type != "tensor(uint8)":
        kind = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
        mean, std = (np.array(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
        images = ((images / np.float32(255) - mean) / std).astype(kind.get(taken.type, np.float32))
    if taken.shape[1] != 32 or taken.shape[-1] != 3:
        images = images.transpose(0, 3, 1, 2)
    batch = taken.shape[0] if isinstance(taken.shape[0], int) else 1
    parts = np.split(images, len(images) // batch)
    vectors = [session.run([output], {taken.name: part})[0] for part in parts]
    return np.concatenate(vectors).reshape(len(images), -1).astype(np.float32)
