"""Ray Data, with the code of its pages "Working with images" and ResNet batch prediction.

``read_images`` decodes, ``map`` applies torchvision's transforms, and an actor pool runs the model.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import ray
import torch
from torchvision import transforms

from benchmarks.models import preset
from benchmarks.peers.task import Task, load, main


class FeatureModel:
    def __init__(self, model: str, log: str) -> None:
        self.model = load(model, log)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            features = self.model(torch.from_numpy(batch["image"])).numpy()
        return {"path": batch["path"], "features": features}


def run(task: Task) -> tuple[list[str], np.ndarray]:
    # Each actor occupies a CPU until it ends, and the tasks that read and decode need CPUs too.
    # With only one CPU per actor, these tasks would never start.
    ray.init(num_cpus=2 * task.workers, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    transform = transforms.Compose([transforms.ToTensor(), preset(task.model)])

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "image": transform(row["image"]).numpy()}

    dataset = (
        ray.data.read_images(task.paths, mode="RGB", include_paths=True)
        .map(preprocess)
        .map_batches(
            FeatureModel,
            fn_constructor_args=(task.model, task.log),
            compute=ray.data.ActorPoolStrategy(size=task.workers),
            batch_size=task.batch_size,
        )
    )
    batches = list(dataset.iter_batches(batch_size=task.batch_size))
    paths = [os.path.abspath(path) for batch in batches for path in batch["path"]]
    return paths, np.concatenate([batch["features"] for batch in batches])


if __name__ == "__main__":
    main(run)
