"""A model that stops in the middle of a job until it is told to go on, so that tests can strike."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from tests.helpers.factories import Tiny

GATE = "IMAGEVEC_TEST_GATE"  # a folder; where it is not set, nothing stops
OPEN = "open"
_calls: dict[int, int] = {}  # by process: this module travels with its values


class Gated(nn.Module):
    """Tiny's features. In a worker, the third forward pass waits for the file ``open``."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # A question about the values: no tracer takes this model, so that each pass runs this code.
        if bool(images.isfinite().all()):
            _pass_gate()
        logits: torch.Tensor = self.tiny(images)
        return logits


def gated() -> nn.Module:
    return Gated()


def _pass_gate() -> None:
    process = os.getpid()
    _calls[process] = _calls.get(process, 0) + 1
    folder = os.environ.get(GATE)
    if folder is None or _calls[process] != 3:
        return
    (Path(folder) / str(process)).touch()
    while not (Path(folder) / OPEN).exists():
        time.sleep(0.05)
