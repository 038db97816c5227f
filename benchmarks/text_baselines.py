"""The alternatives for texts: a row-wise UDF, and a loop over open_clip without Spark."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import open_clip
import torch
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from pyspark.sql.types import ArrayType, FloatType

BATCH_SIZE = 32


@functools.cache
def model(name: str) -> Any:
    """Returns an open_clip model with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(name).eval()


def rowwise_udf(spark: SparkSession, name: str) -> Any:
    """Returns a UDF with one text per forward pass; each worker rebuilds a broadcast model once."""
    state_dict = spark.sparkContext.broadcast(model(name).state_dict())
    return udf(
        lambda text: _one_text(_rebuilt_once(name, state_dict), text), ArrayType(FloatType())
    )


def loop(name: str, texts: list[str], threads: int) -> np.ndarray:
    """Computes float32 ``(N, D)`` in batches, in this process."""
    torch.set_num_threads(threads)
    tokenizer = open_clip.get_tokenizer(name)
    vectors = []
    with torch.inference_mode():
        for begin in range(0, len(texts), BATCH_SIZE):
            tokens = tokenizer(texts[begin : begin + BATCH_SIZE])
            vectors.append(model(name).encode_text(tokens).numpy())
    return np.concatenate(vectors)


_rebuilt: dict[str, Any] = {}


def _rebuilt_once(name: str, state_dict: Any) -> Any:
    if name not in _rebuilt:
        net = open_clip.create_model(name)
        net.load_state_dict(state_dict.value)
        _rebuilt[name] = net.eval(), open_clip.get_tokenizer(name)
    return _rebuilt[name]


def _one_text(rebuilt: tuple[Any, Any], text: str) -> list[float]:
    net, tokenizer = rebuilt
    with torch.inference_mode():
        vector: list[float] = net.encode_text(tokenizer([text]))[0].tolist()
    return vector
