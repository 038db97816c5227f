"""The input and output of a peer's process, the same for all peers.

A peer runs in a separate process, with ``workers`` copies of the model. Each copy starts, loads the
model, and then receives its share of the images. The figures exclude startup, as those of warm
Spark workers do: time is measured from the moment the last copy has loaded its model.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.models import load_feature_model


@dataclass(frozen=True)
class Task:
    """The vectors to compute.

    Attributes:
        model: Name in ``torchvision.models``.
        paths: Paths of the images, one for each time an image is processed.
        workers: Number of copies of the model.
        batch_size: Images per forward pass.
        log: File to which each copy appends a line when it has loaded its model.
    """

    model: str
    paths: list[str]
    workers: int
    batch_size: int
    log: str


_loading = threading.Lock()


def load(model: str, log: str) -> nn.Module:
    """Loads the model in the ``__init__`` of a copy, and logs the time."""
    with _loading:  # copies may be threads, which share the random seed
        loaded = load_feature_model(model)
    with open(log, "a") as file:
        file.write(f"{time.time()}\n")
    return loaded


def main(run: Callable[[Task], tuple[list[str], np.ndarray]]) -> None:
    """Runs one task from the command line.

    Args:
        run: Function that returns the paths and their vectors, in any order.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path, help="a JSON file")
    parser.add_argument("output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    task = Task(**json.loads(arguments.task.read_text()))
    start = time.time()
    paths, vectors = run(task)
    end = time.time()
    loaded = max(map(float, Path(task.log).read_text().split()))
    by_path = dict(zip(paths, vectors, strict=True))
    np.save(
        arguments.output.with_suffix(".npy"), [by_path[path] for path in dict.fromkeys(task.paths)]
    )
    figures = {"images": len(paths), "seconds": end - loaded, "start_seconds": loaded - start}
    arguments.output.write_text(json.dumps(figures))
