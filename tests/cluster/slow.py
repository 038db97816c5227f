"""A model that takes its time, so that tests can strike while it computes."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from tests.helpers.factories import Tiny

PAUSE = "IMAGEVEC_TEST_PAUSE"  # seconds of each forward pass; where it is not set, there is none


class Slow(nn.Module):
    """Tiny's features."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # A question about the values: no tracer takes this model, so that each pass runs this code.
        if bool(images.isfinite().all()):
            time.sleep(float(os.environ.get(PAUSE, "0")))
        logits: torch.Tensor = self.tiny(images)
        return logits


def slow() -> nn.Module:
    return Slow()
