"""Protocols of engines, which run forward passes, and of the backends that create them.

A backend is a module of this package with a name in ``imagevec.options.ENGINES`` and the members of
``Backend``. An engine takes cropped uint8 pixels and normalises them itself, because transferring
float32 pixels to a device would take four times as many bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from imagevec.spec import FeatureSpec

if TYPE_CHECKING:
    from imagevec.models.features import FeatureModel
    from imagevec.models.onnx_file import OnnxFile
    from imagevec.models.source import ModelSource


Inputs = npt.NDArray[Any]
"""Pixels of images, uint8 ``(N, H, W, 3)``, or tokens of texts, int32 ``(N, L)``; contiguous."""


class Engine(Protocol):
    """A loaded model that is ready to run."""

    def __call__(self, inputs: Inputs, /) -> npt.NDArray[np.float32]:
        """Computes float32 ``(N, D)`` from inputs with any N >= 1."""


class Backend(Protocol):
    """A library that runs forward passes. The backend's module imports the library on first use."""

    NAME: str
    """The name in ``imagevec.options.ENGINES``."""

    BUILDS_MODULE: bool
    """Whether workers build the model from its source with PyTorch instead of loading it."""

    WORKER_MEMORY_MB: int
    """Recommended memory of a worker with ResNet-50, above the peak in ``benchmarks/results``."""

    def is_available(self) -> bool:
        """Returns whether the library is installed, without importing it."""

    def preload(self) -> None:
        """Imports what workers need before they are forked. Starts no threads."""

    def version(self) -> str:
        """Returns the version that ``prepare`` depends on. A new one invalidates prepared files."""

    def why_not(self, precision: str, device: str) -> str | None:
        """Returns the reason why the backend cannot run these options, or ``None`` if it can.

        Args:
            precision: One of ``imagevec.options.PRECISIONS``.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        """

    def has_bfloat16(self, device: str) -> bool:
        """Returns whether the device, on this machine, computes bfloat16 faster than float32.

        Libraries also compute bfloat16 without such instructions, at a third of the speed.
        """

    def prepare(self, model: FeatureModel) -> tuple[Path, ...]:
        """Returns the files in the user's cache from which ``load`` creates an engine.

        Runs on the driver. The files do not depend on the precision.

        Raises:
            ConversionError: The backend cannot run this model, or computes other vectors.
            OptionError: The vectors are not finite, random, or depend on other inputs.
            WeightsError: The vectors are not finite because the weights are not.
        """

    def load(
        self,
        spec: FeatureSpec,
        source: ModelSource | None,
        files: Sequence[Path],
        device: str,
        threads: int,
    ) -> Engine:
        """Loads the engine on a worker.

        Args:
            spec: The features to compute, in the precision to use on this machine.
            source: The model source, if ``BUILDS_MODULE`` is true.
            files: The files from ``prepare``, in order.
            device: ``"cpu"`` or ``"cuda:N"``.
            threads: The number of threads of one forward pass on the CPU.
        """


class OnnxBackend(Backend, Protocol):
    """A backend that reads ONNX files."""

    def prepare_onnx(
        self, file: OnnxFile, model: FeatureModel
    ) -> tuple[tuple[Path, ...], tuple[int, ...]]:
        """Returns the files for ``load``, and the length of each layer's vector.

        Runs on the driver.

        Raises:
            OptionError: The backend cannot run the graph, or an option does not fit it.
            WeightsError: The graph returns no finite numbers.
        """


def backend(name: str) -> Backend:
    """Returns the backend with a name in ``imagevec.options.ENGINES``."""
    return cast(Backend, importlib.import_module(f"imagevec.engines.{name}"))
