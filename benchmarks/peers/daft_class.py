"""Daft, with the code of its documentation on images and class UDFs.

``download`` and ``decode_image`` create a column of images. Instances of a class with a batch
method apply torchvision's preset and run the model. Daft runs the instances in threads, because it
ignores ``use_process=True`` for methods that take a column of images. (With a column of encoded
bytes, it uses processes, which decode with Pillow; that was no faster.)
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
