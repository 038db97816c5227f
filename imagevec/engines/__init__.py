"""Engines: a prepared forward pass behind one small protocol, and the backends that make them.

A backend is one module of this folder, of the name that ``imagevec.options.ENGINES`` has, with the
functions of ``Backend``. An engine takes pixels as they are after the crop, and normalises them
itself: as uint8 they are a quarter of what float32 would move to a device.
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
    from imagevec.models.entry import ModelSource
    from imagevec.models.features import FeatureModel


Inputs = npt.NDArray[Any]
"""Pixels of images, uint8 ``(N, S, S, 3)``, or tokens of texts, int32 ``(N, L)``; contiguous."""


class Engine(Protocol):
    """A model, loaded and ready."""

    def __call__(self, inputs: Inputs, /) -> npt.NDArray[np.float32]:
        """Inputs, for any N >= 1, to float32 ``(N, D)``."""


class Backend(Protocol):
    """A library that runs forward passes. Its module imports it where it is used, not before."""

    BUILDS_MODULE: bool
    """Whether workers build the model from its source, with PyTorch. Else it is in the files."""

    WORKER_MEMORY_MB: int
    """What a worker with ResNet-50 should have: more than the peak in ``benchmarks/results``."""

    def is_available(self) -> bool:
        """Whether it is installed; it is not imported."""

    def preload(self) -> None:
        """Imports what its workers need, before they are forked; it starts no thread."""

    def version(self) -> str:
        """Of what ``prepare`` depends on: another version prepares anew."""

    def why_not(self, precision: str, device: str) -> str | None:
        """Why it cannot run this, for a person; ``None`` if it can.

        Args:
            precision: One of ``imagevec.options.PRECISIONS``.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        """

    def has_bfloat16(self, device: str) -> bool:
        """Whether this machine computes bfloat16 natively there."""

    def prepare(self, model: FeatureModel) -> tuple[Path, ...]:
        """On the driver: the files that an engine is loaded from, in the user's cache.

        They do not depend on the precision.

        Raises:
            OptionError: It cannot run this model.
        """

    def load(
        self,
        spec: FeatureSpec,
        source: ModelSource | None,
        files: Sequence[Path],
        device: str,
        threads: int,
    ) -> Engine:
        """On the worker: the engine.

        Args:
            spec: What to compute.
            source: What builds the model, with ``BUILDS_MODULE``.
            files: What ``prepare`` made, in order.
            device: ``"cpu"`` or ``"cuda:N"``.
            threads: Of one forward pass on the CPU.
        """


def backend(name: str) -> Backend:
    """The backend of a name in ``imagevec.options.ENGINES``."""
    return cast(Backend, importlib.import_module(f"imagevec.engines.{name}"))
