"""Daft, as its pages on images and on class UDFs write it.

``download`` and ``decode_image`` make a column of images, and a class with a batch method, in some
instances, applies torchvision's preset and runs the model. Daft runs the instances in threads: it
ignores ``use_process=True`` where a method takes a column of images. (A column of encoded bytes
goes to processes, which then decode with Pillow: that was no faster.)
"""

from __future__ import annotations

import daft
import numpy as np
import torch
from daft import DataType, Series, col
from daft.functions import decode_image, download
from PIL import Image

from benchmarks.models import preset
from benchmarks.peers.task import Task, load, main


def run(task: Task) -> tuple[list[str], np.ndarray]:
    @daft.cls(max_concurrency=task.workers, use_process=True)
    class FeatureModel:
        def __init__(self, model: str, log: str) -> None:
            self.model = load(model, log)
            self.preprocess = preset(model)

        @daft.method.batch(
            return_dtype=DataType.list(DataType.float32()), batch_size=task.batch_size
        )
        def features(self, images: Series) -> list[np.ndarray]:
            batch = [self.preprocess(Image.fromarray(image)) for image in images.to_pylist()]
            with torch.inference_mode():
                return list(self.model(torch.stack(batch)).numpy())

    model = FeatureModel(task.model, task.log)
    frame = daft.from_pydict({"path": task.paths})
    frame = frame.with_column("image", decode_image(download(col("path")), mode="RGB"))
    frame = frame.select("path", model.features(col("image")).alias("features"))
    table = frame.to_arrow()
    vectors = table["features"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return table["path"].to_pylist(), vectors


if __name__ == "__main__":
    main(run)
