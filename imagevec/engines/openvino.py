"""The OpenVINO backend, the fastest one on x86 and Arm CPUs.

A model is converted once on the driver into two files: ``.xml`` (the graph) and ``.bin`` (the
weights). Workers need only these files, not the model's Python code or PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imagevec import cache
from imagevec.engines import Inputs, devices
from imagevec.errors import MissingExtraError
from imagevec.models.source import ConversionError
from imagevec.spec import FeatureSpec, Tokenization

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagevec.models.features import FeatureModel
    from imagevec.models.onnx_file import OnnxFile
    from imagevec.models.source import ModelSource

# int8 models compute in float32 outside their quantized layers.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}

_UNWRITTEN = 0x7FC0DEAD  # the bits of a NaN that no computation returns

NAME = "openvino"
BUILDS_MODULE = False
WORKER_MEMORY_MB = 768


def is_available() -> bool:
    try:
        return importlib.util.find_spec("openvino") is not None
    except ValueError:  # openvino is in sys.modules without a spec
        return False


def preload() -> None:
    _openvino()


def version() -> str:
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("openvino", "openvino") from error


def why_not(precision: str, device: str) -> str | None:
    if device != "cpu":
        return f"engine='openvino' runs on the CPU, not on device={device!r}"
    if precision == "float16":
        return "precision='float16' needs CUDA: did you mean 'bfloat16'?"
    return None


def has_bfloat16(device: str) -> bool:
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def prepare(model: FeatureModel) -> tuple[Path, ...]:
    """Returns the files of the graph and its weights, whose vectors are PyTorch's."""
    from imagevec.engines.check import check_conversion

    precision = model.spec.precision
    converted = convert(model)
    needed_bytes = sum(tensor.nbytes for tensor in model.module.state_dict().values())
    with cache.temporary_folder(needed_bytes) as folder:
        files = save(converted, folder)
        del converted
        try:
            check_conversion(model, lambda n: OpenVINOEngine(read(files), precision, n))
        except ConversionError as error:
            raise ConversionError(f"{error}{_tracing_hint(model)}") from error
        return tuple(cache.store(path, move=True) for path in files)


def prepare_onnx(file: OnnxFile, model: FeatureModel) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """Returns the files of the graph and its weights, and the length of each layer's vector."""
    from imagevec.engines import openvino_onnx

    converted, sizes = openvino_onnx.convert(file, model)
    needed_bytes = sum(path.stat().st_size for path in (file.path, *file.external))
    with cache.temporary_folder(needed_bytes) as folder:
        return tuple(cache.store(x, move=True) for x in save(converted, folder)), sizes


def load(
    spec: FeatureSpec,
    source: ModelSource | None,
    files: Sequence[Path],
    device: str,
    threads: int,
) -> OpenVINOEngine:
    return OpenVINOEngine(read(files), spec.precision, threads)


def convert(model: FeatureModel) -> Any:
    """Converts a model to an ``openvino.Model`` from ``Inputs`` to float32 ``(?, D)``."""
    import torch

    openvino = _openvino()
    module, example, shape = _traceable(model)
    with (
        devices.within_quota(),
        without_telemetry(),
        _root_logger_kept(),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # tracing warns about each shape it treats as constant
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        decoder = TorchScriptPythonDecoder(
            module,
            example_input=example,
            # Tracing again to compare takes longer than the rest of the conversion.
            trace_kwargs={"check_trace": False},
        )
        return openvino.convert_model(decoder, input=[openvino.PartialShape(shape)])


def _traceable(model: FeatureModel) -> tuple[nn.Module, torch.Tensor, list[int]]:
    """Returns a module that takes ``Inputs``, two of them, and their shape, with -1 for any."""
    import torch

    from imagevec.engines.torch_engine import PixelModel

    how, module = model.preprocessing, model.module
    if isinstance(how, Tokenization):
        length = how.context_length
        example = torch.zeros(2, length, dtype=torch.int32)
        return module, example, [-1, length if how.reads_padding else -1]
    example = torch.zeros(2, *how.input_shape, 3, dtype=torch.uint8)
    return PixelModel(module, how).eval(), example, [-1, *example.shape[1:]]


def _tracing_hint(model: FeatureModel) -> str:
    """Returns the first place in the user's code where tracing fixes a value, for an error.

    Libraries make Python values of tensors, too: of their shapes, which they only check.
    """
    import torch

    module, example, _ = _traceable(model)
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        torch.jit.trace(  # type: ignore[no-untyped-call]
            module, example, check_trace=False, strict=False
        )
    for warning in warned:
        is_own = {"site-packages", "dist-packages"}.isdisjoint(Path(warning.filename).parts)
        if is_own and "to a Python" in str(warning.message):
            what = str(warning.message).partition(" might cause")[0]
            return f". Tracing fixes Python values: {warning.filename}:{warning.lineno}: {what}"
    return ""


def save(model: Any, folder: Path) -> tuple[Path, ...]:
    """Writes an ``openvino.Model`` to the two files that ``load`` reads."""
    graph = folder / "model.xml"
    _openvino().save_model(model, graph, compress_to_fp16=False)
    return graph, graph.with_suffix(".bin")


def read(files: Sequence[Path]) -> Any:
    """Reads an ``openvino.Model`` from the two files."""
    graph, weights = files
    return _openvino().Core().read_model(graph, weights)


class OpenVINOEngine:
    """A converted model, compiled for this CPU.

    Args:
        model: An ``openvino.Model`` from ``Inputs`` to float32 ``(?, D)``. If it only takes a batch
            of one, it runs for each input.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        threads: The number of threads of one forward pass.
    """

    def __init__(self, model: Any, precision: str, threads: int) -> None:
        compiled = _openvino().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                # Otherwise, every worker process pins its threads to the same first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        # A graph that was exported for one image, and does not accept more.
        self._takes_one = compiled.input(0).partial_shape[0] == 1
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs a single inference at a time

    def __call__(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        with self._lock:
            if self._takes_one:
                return np.concatenate([self._infer(inputs[i : i + 1]) for i in range(len(inputs))])
            return self._infer(inputs)

    def _infer(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        before = self._output()
        if before.size:  # not before the first forward pass of some graphs
            before[:, 0] = _UNWRITTEN
        self._request.infer({0: inputs})
        features = self._output()
        # Without memory, infer raises nothing and leaves the last output, or an empty one.
        if not features.size or (features[:, 0] == _UNWRITTEN).any():
            raise MemoryError(f"too little for a forward pass of {len(inputs)} inputs")
        return features.view(np.float32).copy()  # the request reuses the output's memory

    def _output(self) -> npt.NDArray[np.uint32]:
        output: npt.NDArray[np.float32] = self._request.get_output_tensor(0).data
        return output.view(np.uint32)


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Prevents OpenVINO and NNCF from sending telemetry over the network.

    Both send it from a forked process when they are imported and called. When that process exits,
    it also closes the driver's connection to its JVM. Apart from a file in the user's home, only
    the environment variable ``CI`` disables telemetry in both.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Restores the root logger, which OpenVINO leaves at the level ERROR if a conversion fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def _openvino() -> Any:
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino
