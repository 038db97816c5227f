"""A model that takes its time, so that tests can strike while it computes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from pyspark import TaskContext
from torch import nn

from imagevec.table import parts
from tests.helpers.factories import Tiny

# Environment variables of the workers. Where they are not set, nothing of this happens.
PAUSE = "IMAGEVEC_TEST_PAUSE"  # seconds of each forward pass
SLOW = "IMAGEVEC_TEST_SLOW"  # so many times longer pauses in the first attempts of some tasks
PART_SECONDS = "IMAGEVEC_TEST_PART_SECONDS"  # after these, a task writes a part
PASSES = "IMAGEVEC_TEST_PASSES"  # a folder with a file for each pass: ``<attempt>-<time>``


class Slow(nn.Module):
    """Tiny's features."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # A question about the values: no tracer takes this model, so that each pass runs this code.
        if bool(images.isfinite().all()):
            _take_time()
        logits: torch.Tensor = self.tiny(images)
        return logits


def slow() -> nn.Module:
    return Slow()


def _take_time() -> None:
    context = TaskContext.get()
    seconds = float(os.environ.get(PAUSE, "0"))
    if context is not None:
        parts._SECONDS = float(os.environ.get(PART_SECONDS, parts._SECONDS))
        if PASSES in os.environ:
            name = f"{context.taskAttemptId()}-{time.monotonic_ns()}"
            (Path(os.environ[PASSES]) / name).touch()
        if context.attemptNumber() == 0 and context.partitionId() % 3 == 0:
            seconds *= float(os.environ.get(SLOW, "1"))
    time.sleep(seconds)
