"""What a peer's process gets and gives: the same for all peers.

A peer runs in a process of its own, with ``workers`` copies of the model that each start, load, and
then get their share of the images. Its figures leave out the start, as those of warm Spark workers
do: time counts from the moment the last copy has loaded its model.
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
    """What to compute.

    Attributes:
        model: A name of ``torchvision.models``.
        paths: The images, each as often as it is to be done.
        workers: Copies of the model.
        batch_size: Images in a forward pass.
        log: A file to which each copy adds a line when it has loaded its model.
    """

    model: str
    paths: list[str]
    workers: int
    batch_size: int
    log: str


_loading = threading.Lock()


def load(model: str, log: str) -> nn.Module:
    """What a copy of the model does in its ``__init__``; notes when it was done."""
    with _loading:  # the seed of the random weights is the process's, and copies may be threads
        loaded = load_feature_model(model)
    with open(log, "a") as file:
        file.write(f"{time.time()}\n")
    return loaded


def main(run: Callable[[Task], tuple[list[str], np.ndarray]]) -> None:
    """Runs one task from the command line.

    Args:
        run: Returns the paths and their vectors, in any order.
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
