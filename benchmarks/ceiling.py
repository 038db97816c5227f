"""Forward passes only: the images/s that no UDF with the same engine and precision can exceed.

The thread layout is that of the Spark rows: as many processes as Spark has workers, with one thread
each, all running at the same time. There is no Spark, no decoding and no copy of the input. The
batch size is the best one in ``BATCH_SIZES`` for each engine.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

BATCH_SIZES = (1, 8, 16)
PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class Engine:
    """A model and the library that runs it.

    Attributes:
        name: ``"torch"`` or ``"openvino"``.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        model: Name in ``torchvision.models``, or the ``.xml`` file of a quantized model for int8.
        input_size: Width and height of the images, in pixels.
    """

    name: str
    precision: str
    model: str
    input_size: int = 224

    def load(self) -> Callable[[int], Callable[[], Any]]:
        """Loads the model and returns a function that makes a forward pass for a batch size."""
        return self._load_openvino() if self.name == "openvino" else self._load_torch()

    def _load_torch(self) -> Callable[[int], Callable[[], Any]]:
        import torch
        from torch.fx.experimental.optimization import fuse

        from benchmarks.models import load_feature_model

        dtype = getattr(torch, self.precision)
        net = load_feature_model(self.model)
        if not self.model.startswith(
            "vit_"
        ):  # has no batch norms, and cannot be traced symbolically
            net = fuse(net)
        net = net.to(dtype).to(memory_format=torch.channels_last)

        def prepare(batch_size: int) -> Callable[[], Any]:
            images = torch.rand(batch_size, 3, self.input_size, self.input_size, dtype=dtype)
            images = images.contiguous(memory_format=torch.channels_last)

            @torch.inference_mode()
            def forward() -> Any:
                return net(images)

            return forward

        return prepare

    def _load_openvino(self) -> Callable[[int], Callable[[], Any]]:
        import sys

        import numpy as np

        # Importing it starts a process that sends an event over the network.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino
        import torch

        from benchmarks.models import load_feature_model

        core = openvino.Core()
        if self.precision == "int8":
            model = core.read_model(Path(self.model))
        else:
            example = torch.rand(2, 3, self.input_size, self.input_size)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # tracing is deprecated
                net = load_feature_model(self.model)
                model = openvino.convert_model(net, example_input=example)
            model.reshape([-1, 3, self.input_size, self.input_size])
        hint = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}[self.precision]
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": 1,
                "NUM_STREAMS": 1,
                # With pinning, all processes would use the first core.
                "ENABLE_CPU_PINNING": False,
            },
        )
        request = compiled.create_infer_request()
        dtype = compiled.input(0).get_element_type().to_dtype()

        def prepare(batch_size: int) -> Callable[[], Any]:
            sides = (self.input_size, self.input_size)
            # imagevec's graphs take (N, S, S, 3).
            is_imagevecs = compiled.input(0).partial_shape[3] == 3
            shape = (batch_size, *sides, 3) if is_imagevecs else (batch_size, 3, *sides)
            images = (np.random.default_rng(0).random(shape) * 255).astype(dtype)
            tensor = openvino.Tensor(images, shared_memory=True)
            return lambda: request.infer({0: tensor})

        return prepare


class Ceiling:
    """Processes that run forward passes on request; a context manager that stops them."""

    def __init__(self, engine: Engine, processes: int) -> None:
        self.engine = engine
        self.batch_size = 0
        self.images_per_second = 0.0
        self._pipes: list[Connection] = []
        self._stack = ExitStack()
        # Not forked: a fork would copy the driver's connection to the JVM.
        context = multiprocessing.get_context("spawn")
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(engine, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._stack.callback(process.join, 10)
            self._stack.callback(ours.send, None)

    def __enter__(self) -> Ceiling:
        rates = {size: self._rate(size) for size in BATCH_SIZES}
        self.batch_size = max(rates, key=lambda size: rates[size])
        self.images_per_second = rates[self.batch_size]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def seconds(self, images: int) -> float:
        """Returns the seconds until the last process has finished its share of the images."""
        return self._seconds(self.batch_size, images)

    def _rate(self, batch_size: int) -> float:
        few = 16 * len(self._pipes)
        images = max(few, round(few / self._seconds(batch_size, few) * PROBE_SECONDS))
        return images / self._seconds(batch_size, images)

    def _seconds(self, batch_size: int, images: int) -> float:
        batches = images / (batch_size * len(self._pipes))
        for pipe in self._pipes:
            pipe.send((batch_size, max(1, round(batches))))
        seconds = max(pipe.recv() for pipe in self._pipes)
        return seconds * batches / max(1, round(batches))


def _serve(engine: Engine, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    prepare = engine.load()
    while request := pipe.recv():
        batch_size, batches = request
        forward = prepare(batch_size)
        forward()
        start = time.perf_counter()
        for _ in range(batches):
            forward()
        pipe.send(time.perf_counter() - start)
