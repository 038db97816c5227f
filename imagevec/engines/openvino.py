"""The OpenVINO engine: the fastest one on x86 and Arm CPUs.

A model is converted once, on the driver, into two files: ``.xml`` (the graph) and ``.bin`` (the
weights). Workers need nothing else, not even the model's Python code.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imagevec.engines import PixelModel
from imagevec.errors import MissingExtraError
from imagevec.spec import Preprocessing

logger = logging.getLogger(__name__)

# What int8 models compute outside their quantized layers.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVINOEngine:
    """A converted model, compiled for this CPU.

    Args:
        model: An ``openvino.Model``: uint8 ``(?, 3, S, S)`` to float32 ``(?, D)``.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        threads: Of one forward pass.
    """

    def __init__(self, model: Any, precision: str, threads: int) -> None:
        if precision == "bfloat16" and not supports_bfloat16():
            logger.warning("this CPU has no bfloat16 instructions: OpenVINO computes in float32")
        compiled = _openvino().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                # Every worker process would pin its threads to the same first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs one inference at a time

    def __call__(self, images: torch.Tensor) -> npt.NDArray[np.float32]:
        with self._lock:
            self._request.infer({0: images.contiguous().numpy()})
            features: npt.NDArray[np.float32] = self._request.get_output_tensor(0).data
            return features.copy()  # the request reuses its memory


def convert(feature_model: nn.Module, preprocessing: Preprocessing) -> Any:
    """A feature model as an ``openvino.Model``: uint8 ``(?, 3, S, S)`` to float32 ``(?, D)``."""
    openvino = _openvino()
    size = preprocessing.crop_size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with without_telemetry(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of each shape that it takes as constant
        return openvino.convert_model(
            PixelModel(feature_model, preprocessing).eval(),
            example_input=example,
            input=[openvino.PartialShape([-1, 3, size, size])],
        )


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Keeps OpenVINO and NNCF from reporting their use over the network.

    They do so when imported and when called, from a forked process, whose end also takes along
    the driver's connection to its JVM. Both have one switch that is not a file in the user's home:
    to run in CI.
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


def read(graph: Path, weights: Path) -> Any:
    """The ``openvino.Model`` of an ``.xml`` and a ``.bin`` file."""
    return _openvino().Core().read_model(graph, weights)


def save(model: Any, graph: Path) -> None:
    """Writes an ``openvino.Model`` to an ``.xml`` file and a ``.bin`` file beside it."""
    _openvino().save_model(model, graph, compress_to_fp16=False)


def is_installed() -> bool:
    """Whether the extra ``openvino`` is."""
    try:
        _openvino()
    except MissingExtraError:
        return False
    return True


def supports_bfloat16() -> bool:
    """Whether this CPU computes bfloat16 natively, by OpenVINO's account."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version() -> str:
    """OpenVINO's version."""
    return str(_openvino().__version__)


def _openvino() -> Any:
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino
