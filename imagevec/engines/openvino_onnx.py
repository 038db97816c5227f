"""Converts ONNX files to OpenVINO models that take pixels and return vectors.

OpenVINO reads the files itself, so that neither PyTorch nor a package for ONNX is needed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from imagevec.engines import devices
from imagevec.engines.openvino import OpenVINOEngine, preload, without_telemetry
from imagevec.errors import OptionError, WeightsError, did_you_mean
from imagevec.images.decode import Pixels
from imagevec.models.onnx_file import OnnxFile
from imagevec.spec import Preprocessing

if TYPE_CHECKING:
    from imagevec.models.features import FeatureModel

logger = logging.getLogger(__name__)

_CHECKED = 3  # images in the largest batch that is compared with single images

# The allowed difference from single images: of the spread, because vectors of untrained models are
# nearly equal, and of the largest number, for rounding errors.
_OF_SPREAD, _OF_LARGEST = 1e-2, 1e-5

_EPSILON = 1e-24  # of the squared length, as in torch.nn.functional.normalize
_FLOATS = ("f16", "bf16", "f32", "f64")


def convert(file: OnnxFile, model: FeatureModel) -> tuple[Any, tuple[int, ...]]:
    """Converts a file to an ``openvino.Model`` from uint8 ``(?, H, W, 3)`` to float32 ``(?, D)``.

    A graph that was exported for a batch of one often accepts larger batches and returns wrong
    numbers. The converted model only accepts them if its vectors are those of single images. Else
    it takes one image, which ``OpenVINOEngine`` passes for each of a batch.

    Args:
        file: The file, which takes images.
        model: The options.

    Returns:
        The model, and the length of each layer's vector.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        OptionError: OpenVINO cannot convert the graph, or an option does not fit it.
        WeightsError: The weights are not numbers.
    """
    preload()
    preprocessing = cast(Preprocessing, model.preprocessing)
    with devices.within_quota() as threads, without_telemetry():
        graph = _read(file)
        batch = file.image.shape[0] or 1
        _resize(graph, file, batch, preprocessing)
        vectors, sizes = _vectors(graph, file, batch, model.layer, model.normalize)
        pixels = _from_pixels(graph, file, vectors, preprocessing)
        return _for_any_batch(pixels, file, batch, threads), sizes


def _read(file: OnnxFile) -> Any:
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    try:
        graph = frontend.convert(frontend.load(str(file.path)))
    except Exception as error:  # OpenVINO raises its own
        raise OptionError(f"OpenVINO cannot convert {file.path}: {_reason(error)}") from error
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and _has_nan(node):
            raise WeightsError(f"{file.path} contains NaN in {node.get_friendly_name()!r}")
    return graph


def _has_nan(constant: Any) -> bool:
    values = constant.data
    return values.size > 1 and values.dtype.kind == "f" and bool(np.isnan(values).any())


def _resize(graph: Any, file: OnnxFile, batch: int, preprocessing: Preprocessing) -> None:
    """Sets all dimensions of the input."""
    height, width = preprocessing.input_shape
    shape = {"N": batch, "C": 3, "H": height, "W": width}
    try:
        graph.reshape([shape[side] for side in file.image.layout])
    except RuntimeError as error:
        raise OptionError(
            f"{file.path.name} cannot take RGB images of {height}x{width}: "
            f"{_reason(error)}; set the size of its input with input_size, or with "
            "preprocessing=Preprocessing(crop_size=...) of register_model"
        ) from error


def _vectors(
    graph: Any, file: OnnxFile, batch: int, layer: str | tuple[str, ...], normalize: bool
) -> tuple[Any, tuple[int, ...]]:
    """Adds a node float32 ``(N, D)`` with the vectors of all layers."""
    from openvino import opset13

    layers = layer if isinstance(layer, tuple) else (layer,)
    parts = []
    for output in [_output(graph, file, batch, name) for name in layers]:
        length = int(np.prod([side.get_length() for side in output.partial_shape][1:]))
        part = opset13.convert(output, np.float32)
        part = opset13.reshape(part, np.array([-1, length]), False)  # (N, D) or (N, D, 1, 1)
        parts.append(opset13.normalize_l2(part, [1], _EPSILON, "max") if normalize else part)
    vectors = opset13.concat(parts, 1) if len(parts) > 1 else parts[0]
    return vectors, tuple(part.output(0).partial_shape[1].get_length() for part in parts)


def _output(graph: Any, file: OnnxFile, batch: int, layer: str) -> Any:
    """Returns the source of the output of a layer.

    Raises:
        OptionError: There is no such output, or it is not a vector.
    """
    by_name = dict(zip(file.outputs, graph.outputs, strict=True))
    vectors = [name for name in by_name if _is_vector(by_name[name], batch)]
    listed = ", ".join(f"{name} {_described(output)}" for name, output in by_name.items())
    cure = "export the model with an output (N, D)"
    if layer == "pooled" and layer not in by_name:
        if len(vectors) != 1:
            cure = f"choose one with layer={vectors[0]!r}" if vectors else cure
            raise OptionError(
                f"layer='pooled' is not valid: {len(vectors) or 'none'} of the outputs of "
                f"{file.path.name} are vectors (N, D): {cure} (outputs: {listed})"
            )
        layer = vectors[0]
    if layer not in by_name:
        near = did_you_mean(layer, [*by_name, "pooled"])
        raise OptionError(f"layer={layer!r} is not known: {near} (outputs: {listed})")
    if layer not in vectors:
        cure = f"use one of {', '.join(map(repr, vectors))}" if vectors else cure
        raise OptionError(
            f"layer={layer!r} is not valid: it is {_described(by_name[layer])} for {batch} images "
            f"and not a vector (N, D): {cure}"
        )
    return by_name[layer].get_node().input_value(0)


def _is_vector(output: Any, batch: int) -> bool:
    """Returns whether an output is float ``(N, D)``, or such with further dimensions of 1."""
    shape = output.partial_shape
    if output.get_element_type().get_type_name() not in _FLOATS or not shape.is_static:
        return False
    first, *others = shape.to_shape() if len(shape) else (0,)
    return first == batch and len(others) > 0 and max(others) == np.prod(others)


def _described(output: Any) -> str:
    kind = {"f16": "float16", "f32": "float32", "f64": "float64"}
    name = output.get_element_type().get_type_name()
    return f"{kind.get(name, name)} {output.partial_shape}"


def _from_pixels(graph: Any, file: OnnxFile, vectors: Any, preprocessing: Preprocessing) -> Any:
    """Returns a model from uint8 ``(N, H, W, 3)``. A graph of uint8 normalises pixels itself."""
    import openvino

    steps = openvino.preprocess.PrePostProcessor(
        openvino.Model([vectors], graph.get_parameters(), "features")
    )
    images = steps.input(0)
    images.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    images.model().set_layout(openvino.Layout(file.image.layout))
    if file.image.dtype != "uint8":
        scaled = images.preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
        scaled.mean(list(preprocessing.mean)).scale(list(preprocessing.std))
    return steps.build()


def _for_any_batch(model: Any, file: OnnxFile, batch: int, threads: int) -> Any:
    """Returns the model for any number of images if it is the same function then, else for one.

    Raises:
        OptionError: The model only takes another number of images.
        WeightsError: The vectors are not finite.
    """
    _, height, width, _ = model.input(0).get_shape()
    images = _examples(-(-_CHECKED // batch) * batch, height, width)
    parts = np.split(images, len(images) // batch)
    engine = OpenVINOEngine(model, "float32", threads)
    expected = np.concatenate([engine(part) for part in parts])  # (N, D)
    if not np.isfinite(expected).all():
        raise WeightsError(f"{file.path.name} returns vectors that are not finite")
    with_any = _with_batches(model)
    if with_any is not None:
        engine = OpenVINOEngine(with_any, "float32", threads)
        spread = np.abs(expected - expected.mean(axis=0)).max()
        allowed = _OF_SPREAD * spread + _OF_LARGEST * np.abs(expected).max()
        counts = range(1, _CHECKED + 1)
        if all(np.abs(engine(images[:n]) - expected[:n]).max() <= allowed for n in counts):
            return with_any
    if batch > 1:
        raise OptionError(
            f"{file.path.name} only takes batches of {batch}: export it with a dynamic batch "
            "dimension, or for a batch of 1"
        )
    logger.warning(
        "%s computes one image at a time, which is slower: with more images, its graph fails or "
        "returns other vectors. Export it with a dynamic batch dimension",
        file.path.name,
    )
    return model


def _with_batches(model: Any) -> Any:
    """Returns the model with a batch of any size, or ``None`` if its shapes forbid others.

    With known shapes, OpenVINO finds the operations that do not fit. Without, it runs them, and
    may end the process.
    """
    for count in (2, 3, -1):
        resized = model.clone()
        try:
            resized.reshape([count, *model.input(0).get_shape()[1:]])
        except RuntimeError:
            return None
        if resized.output(0).partial_shape[0] != resized.input(0).partial_shape[0]:
            return None
    return resized


def _examples(count: int, height: int, width: int) -> Pixels:
    """Returns different images of coloured squares, uint8 ``(N, H, W, 3)``."""
    squares = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    rows, columns = (np.arange(side) * 4 // side for side in (height, width))
    return np.ascontiguousarray(squares[:, rows][:, :, columns])


def _reason(error: Exception) -> str:
    """Returns the part of an error of OpenVINO that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [
        x for x in lines if x and not x.startswith(("Check '", "Exception from", "FrontEnd API"))
    ]
    return " ".join(said)[:400] or str(error)[:400]
