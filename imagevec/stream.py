"""Converts Arrow batches of images or texts to Arrow batches of feature vectors, row by row.

Rows keep their order. Batches for the forward pass are formed across Arrow batches, so the size of
the Arrow batches does not matter. Memory is bounded by the batch size: rows are decoded on demand,
and results are yielded as soon as a batch is complete. This module does not depend on Spark.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from imagevec.engines import Engine, Inputs
from imagevec.errors import ImageError, OptionError
from imagevec.images.isolation import isolated
from imagevec.images.parallel import map_ahead, map_in_turns
from imagevec.images.prepare import Row, prepare
from imagevec.images.reading import read_ahead
from imagevec.images.values import Value, values_of
from imagevec.spec import ExecutionOptions, FeatureSpec, Preprocessing
from imagevec.texts.tokenize import Tokenizer
from imagevec.texts.values import texts_of

Counts = defaultdict[str, float]

_T = TypeVar("_T")

_MAX_ROWS_PER_INPUT = 16  # rows with nulls and errors that may wait, per input of a batch


@dataclass(frozen=True)
class Schedule:
    """How a task uses the cores that Spark assigned to it.

    Attributes:
        batch_size: The maximum number of images per forward pass.
        forward_threads: The number of threads of a forward pass on the CPU.
        decode_threads: The number of images that are decoded concurrently.
        overlap: Whether to decode the next images during the forward pass. If false, decoding and
            the forward pass alternate, which wastes nothing if both use the same cores.
    """

    batch_size: int
    forward_threads: int = 1
    decode_threads: int = 1
    overlap: bool = False


def feature_stream(
    batches: Iterable[pd.Series | pd.DataFrame],
    engine: Engine,
    spec: FeatureSpec,
    execution: ExecutionOptions,
    schedule: Schedule,
    counts: Counts | None = None,
) -> Iterator[pd.Series | pd.DataFrame]:
    """Yields one output row per input row, in order, in batches of different sizes.

    Args:
        batches: Series of bytes or paths, or data frames with the fields of a struct.
        engine: The engine that runs the forward pass.
        spec: The spec, for its preprocessing and layers.
        execution: Limits, error policy and the form of the result.
        schedule: The batch size and the threads.
        counts: A dictionary to which the task's counts are added: see ``imagevec.Metrics``.

    Yields:
        Series of float32 ``(D,)`` arrays and nulls, or data frames with such a column per layer;
        with ``output="struct"``, data frames of ``features``, ``error``, ``width``, ``height`` and
        ``truncated``.

    Raises:
        ImageError: An image is bad and ``on_error="raise"``.
        OptionError: The type of the input is not accepted, or the engine does not return a vector
            of the spec for each image.
        ReadError: A path could not be read for a reason outside the path.
    """
    counts = defaultdict(float) if counts is None else counts
    in_column = (value for batch in batches for value in values_of(batch))
    read = read_ahead(
        in_column,
        execution.allowed_roots,
        execution.read_timeout_seconds,
        execution.formats,
        execution.max_bytes,
    )
    values = _timed(read, counts)
    rows = _rows(values, _prepare_function(spec, execution), schedule)
    if execution.on_error == "raise":
        rows = map(_raise_error, rows)
    for group in _grouped(rows, schedule.batch_size):
        features = _features(group, engine, spec, np.stack, counts)
        _count(group, "images", counts)
        yield _to_pandas(group, features, execution.output, spec.layer_sizes)


def text_stream(
    batches: Iterable[pd.Series],
    engine: Engine,
    spec: FeatureSpec,
    tokenizer: Tokenizer,
    schedule: Schedule,
    counts: Counts | None = None,
) -> Iterator[pd.Series]:
    """Yields one output row per input row, like ``feature_stream``, for texts.

    Args:
        batches: Series of texts and nulls.
        engine: The engine that runs the forward pass.
        spec: The spec, for its number of features.
        tokenizer: The model's tokenizer.
        schedule: The batch size.
        counts: A dictionary to which the task's counts are added: see ``imagevec.Metrics``.

    Yields:
        Series of float32 ``(D,)`` arrays and nulls.

    Raises:
        OptionError: The input contains values that are not text, or the engine does not return a
            vector of the spec for each text.
    """
    counts = defaultdict(float) if counts is None else counts
    texts = _timed((text for batch in batches for text in texts_of(batch)), counts)
    for group in _grouped(map(functools.partial(_tokens, tokenizer), texts), schedule.batch_size):
        features = _features(group, engine, spec, tokenizer.stack, counts)
        _count(group, "texts", counts)
        yield pd.Series(features, dtype=object)


def _tokens(tokenizer: Tokenizer, text: str | None) -> Row:
    if text is None:
        return Row()
    start = time.perf_counter()
    tokens = tokenizer(text)
    return Row(tokens, preprocess_seconds=time.perf_counter() - start)


def _prepare_function(spec: FeatureSpec, execution: ExecutionOptions) -> Callable[[Value], Row]:
    here: Callable[[Value], Row] = functools.partial(
        prepare, preprocessing=cast(Preprocessing, spec.preprocessing), options=execution
    )
    decoding = isolated(here) if execution.isolate else here

    def prepare_value(value: Value) -> Row:
        has_data = value.data is not None and not isinstance(value.data, ImageError)
        row = (decoding if has_data else here)(value)
        return row if row.error is None else row._replace(path=value.path)

    return prepare_value


def _rows(
    values: Iterator[Value], prepare_value: Callable[[Value], Row], schedule: Schedule
) -> Iterator[Row]:
    if schedule.overlap:
        ahead = 2 * schedule.batch_size
        return map_ahead(prepare_value, values, schedule.decode_threads, ahead)
    if schedule.decode_threads > 1:
        return map_in_turns(prepare_value, values, schedule.decode_threads, schedule.batch_size)
    return map(prepare_value, values)


def _raise_error(row: Row) -> Row:
    if row.error is None:
        return row
    code, detail = row.error.code, row.error.detail
    if row.path is not None and row.path not in detail:
        detail = f"{row.path}: {detail}"
    raise ImageError(code, detail) from row.error


def _split(
    vector: npt.NDArray[np.float32], layer_sizes: dict[str, int]
) -> dict[str, npt.NDArray[np.float32]]:
    """Splits concatenated vectors of several layers.

    Args:
        vector: float32 ``(D,)``, where D is the sum of the sizes.
        layer_sizes: The sizes, as in ``FeatureSpec.layer_sizes``.
    """
    ends = list(itertools.accumulate(layer_sizes.values()))
    return dict(zip(layer_sizes, np.split(vector, ends[:-1]), strict=True))


def _features(
    group: list[Row],
    engine: Engine,
    spec: FeatureSpec,
    stack: Callable[[Any], Inputs],
    counts: Counts,
) -> list[npt.NDArray[np.float32] | None]:
    """Returns the vector ``(D,)`` of each row, or ``None`` for a row without an input.

    Raises:
        OptionError: The engine does not return ``(N, D)`` for N inputs.
    """
    inputs = [row.input for row in group if row.input is not None]
    if not inputs:
        return [None] * len(group)
    start = time.perf_counter()
    vectors = engine(stack(inputs))  # (N, H, W, 3) or (N, L) -> (N, D)
    counts["seconds.forward"] += time.perf_counter() - start
    counts["batches"] += 1
    expected = (len(inputs), sum(spec.sizes))
    if vectors.shape != expected:
        raise OptionError(
            f"model={spec.model!r} is not valid: its output for a batch of {len(inputs)} has the "
            f"shape {vectors.shape}, not {expected}"
        )
    each = iter(vectors)
    return [None if row.input is None else next(each) for row in group]


def _count(group: list[Row], kind: str, counts: Counts) -> None:
    for row in group:
        counts["rows"] += 1
        if row.input is not None:
            counts[kind] += 1
        elif row.error is None:
            counts["nulls"] += 1
        else:
            counts[f"errors.{row.error.code}"] += 1
        counts["seconds.decode"] += row.decode_seconds
        counts["seconds.preprocess"] += row.preprocess_seconds


def _timed(values: Iterator[_T], counts: Counts) -> Iterator[_T]:
    """Yields the values and counts the seconds spent waiting for Spark or for files."""
    while True:
        start = time.perf_counter()
        try:
            value = next(values)
        except StopIteration:
            return
        finally:
            counts["seconds.read"] += time.perf_counter() - start
        yield value


def _grouped(rows: Iterable[Row], batch_size: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    inputs = 0
    for row in rows:
        group.append(row)
        inputs += row.input is not None
        if inputs == batch_size or len(group) == batch_size * _MAX_ROWS_PER_INPUT:
            yield group
            group, inputs = [], 0
    if group:
        yield group


def _to_pandas(
    group: list[Row],
    features: list[npt.NDArray[np.float32] | None],
    output: str,
    layer_sizes: dict[str, int] | None,
) -> pd.Series | pd.DataFrame:
    vectors = pd.Series(features, dtype=object)
    if layer_sizes is not None:
        nulls = dict.fromkeys(layer_sizes)
        by_layer = [nulls if v is None else _split(v, layer_sizes) for v in features]
        if output == "array":
            return pd.DataFrame(by_layer, columns=list(layer_sizes), dtype=object)
        vectors = pd.Series(by_layer, dtype=object)
    if output == "array":
        return vectors
    return pd.DataFrame(
        {
            "features": vectors,
            "error": pd.Series(
                [str(row.error) if row.error else None for row in group], dtype=object
            ),
            "width": pd.array([row.width for row in group], dtype="Int32"),
            "height": pd.array([row.height for row in group], dtype="Int32"),
            "truncated": pd.array([row.truncated for row in group], dtype="boolean"),
        }
    )
