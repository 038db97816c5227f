"""The alternatives that users write: four UDFs on a binary column, all returning pooled vectors.

Each follows its guide or documentation. Code that does not work there is fixed, in favour of the
alternative. Thread counts are left to Spark, which sets ``OMP_NUM_THREADS=1``
(``spark.task.cpus``) in each Python worker; PyTorch follows it.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import ArrayType, FloatType
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model

from benchmarks.models import decode, load_feature_model, preset, without_classifier

BATCH_SIZE = 32
VECTOR = ArrayType(FloatType())


def rowwise_udf(model: str = "resnet50", weights: str = "random") -> Any:
    """Returns a plain UDF: one image per forward pass, one model per worker process."""

    return udf(lambda content: _one_image(_load_once(model, weights), model, content), VECTOR)


def broadcast_udf(model: str = "resnet50", weights: str = "random") -> Any:
    """Returns the same UDF with a broadcast ``state_dict``; each worker rebuilds the model once."""
    state_dict = _broadcast(load_feature_model(model, weights))
    key = uuid.uuid4().hex
    return udf(
        lambda content: _one_image(_rebuild_once(key, model, state_dict), model, content), VECTOR
    )


def guide_pandas_udf(model: str = "resnet50", weights: str = "random") -> Any:
    """Returns the iterator pandas UDF of the Databricks guides to inference with PyTorch.

    The model is broadcast and rebuilt once per task. A ``DataLoader`` over each Arrow batch decodes
    and stacks the images.
    """
    state_dict = _broadcast(load_feature_model(model, weights))

    @pandas_udf(VECTOR)  # type: ignore[call-overload]
    def features(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        net = _rebuild(model, state_dict.value)
        for contents in batches:
            loader = DataLoader(ImageDataset(contents, preset(model)), batch_size=BATCH_SIZE)
            with torch.no_grad():
                vectors = [vector for images in loader for vector in net(images).numpy()]
            yield pd.Series(vectors)

    return features


def predict_batch(model: str = "resnet50", weights: str = "random") -> Any:
    """Returns Spark's ``predict_batch_udf``.

    It passes a scalar column to ``predict`` as a one-dimensional array, so ``predict`` decodes the
    bytes. A separate UDF that decodes into a tensor column would be slower: it would send 150,528
    floats per image through Arrow three times.
    """

    def make_predict() -> Callable[[np.ndarray], np.ndarray]:
        net = load_feature_model(model, weights)
        preprocess = preset(model)

        def predict(contents: np.ndarray) -> np.ndarray:
            images = torch.stack([preprocess(decode(content)) for content in contents])
            with torch.no_grad():
                return net(images).numpy()

        return predict

    return predict_batch_udf(make_predict, return_type=VECTOR, batch_size=BATCH_SIZE)


class ImageDataset(Dataset[torch.Tensor]):
    """Decodes images and applies a preset."""

    def __init__(self, contents: pd.Series, preprocess: Callable[[Any], torch.Tensor]) -> None:
        self.contents = contents.tolist()
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(decode(self.contents[index]))


# These caches keep one model per process, because pickle stores a module's function by name. A
# cache in a closure, or a global dictionary that a closure uses, would be pickled and filled per
# task.
@functools.cache
def _load_once(model: str, weights: str) -> nn.Module:
    return load_feature_model(model, weights)


@functools.cache
def _preset_once(model: str) -> Any:
    return preset(model)


_rebuilt: dict[str, nn.Module] = {}


def _rebuild_once(key: str, model: str, state_dict: Any) -> nn.Module:
    if key not in _rebuilt:
        _rebuilt[key] = _rebuild(model, state_dict.value)
    return _rebuilt[key]


def _one_image(net: nn.Module, model: str, content: bytes) -> list[float]:
    with torch.no_grad():
        return net(_preset_once(model)(decode(content)).unsqueeze(0))[0].tolist()


def _broadcast(net: nn.Module) -> Any:
    spark = SparkSession.getActiveSession()
    if spark is None:
        raise RuntimeError("a broadcast needs an active Spark session")
    return spark.sparkContext.broadcast(net.state_dict())


def _rebuild(model: str, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    net = without_classifier(get_model(model, weights=None)).eval()
    net.load_state_dict(state_dict)
    return net
