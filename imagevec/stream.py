"""Converts Arrow batches of images or texts to Arrow batches of feature vectors, row by row.

Rows keep their order. Batches for the forward pass are formed across Arrow batches, so the size of
the Arrow batches does not matter. Memory is bounded by the batch size: rows are decoded on demand,
and results are yielded as soon as a batch is complete. This module does not depend on Spark.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from imagevec.engines import Engine, Inputs
from imagevec.errors import ImageError, OptionError
from imagevec.images.boxes import crop, values_with_boxes
from imagevec.images.isolation import isolated
from imagevec.images.parallel import map_ahead, map_in_turns
from imagevec.images.prepare import Row, decoded, prepare
from imagevec.images.reading import read_ahead
from imagevec.images.values import Value, values_of
from imagevec.spec import ExecutionOptions, FeatureSpec, Preprocessing
from imagevec.texts.tokenize import Tokenizer
from imagevec.texts.values import texts_of

Counts = defaultdict[str, float]

_T = TypeVar("_T")

Vector = npt.NDArray[np.float32]

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
    here = functools.partial(
        prepare, preprocessing=cast(Preprocessing, spec.preprocessing), options=execution
    )
    values = _read(in_column, execution, counts)
    rows = _rows(values, _prepare_function(here, execution.isolate), schedule)
    if execution.on_error == "raise":
        rows = map(_raise_error, rows)
    for group in _grouped(rows, schedule.batch_size):
        features = _features(group, engine, spec, np.stack, counts)
        _count(group, "images", counts)
        yield _to_pandas(group, features, execution.output, spec.layer_sizes)


def box_stream(
    batches: Iterable[tuple[pd.Series | pd.DataFrame, pd.Series]],
    engine: Engine,
    spec: FeatureSpec,
    execution: ExecutionOptions,
    schedule: Schedule,
    counts: Counts | None = None,
) -> Iterator[pd.Series | pd.DataFrame]:
    """Yields one output row per input row, like ``feature_stream``, with a vector for each box.

    An image is decoded once, and batches for the forward pass are formed across images. Few images
    are decoded ahead, and boxes are cropped on demand, so that memory is bounded by the batch size
    and by an image with its vectors.

    Args:
        batches: Pairs of images, as in ``feature_stream``, and Series of arrays of boxes.
        engine: The engine that runs the forward pass.
        spec: The spec, for its preprocessing and layers. Images are decoded at full size: boxes of
            a scaled one would be too small.
        execution: Limits, error policy and the form of the result.
        schedule: The batch size and the threads.
        counts: A dictionary to which the task's counts are added: see ``imagevec.Metrics``.

    Yields:
        Series of lists and nulls. A list has a float32 ``(D,)`` array for each box, or a null for a
        bad box. Several layers and ``output="struct"`` return data frames, as in
        ``feature_stream``; the latter also have ``box_errors``.

    Raises:
        ImageError: An image or a box is bad and ``on_error="raise"``.
        OptionError: The type of the input is not accepted, or the engine does not return a vector
            of the spec for each box.
        ReadError: A path could not be read for a reason outside the path.
    """
    counts = defaultdict(float) if counts is None else counts
    in_columns = (value for batch in batches for value in values_with_boxes(batch))
    preprocessing = cast(Preprocessing, spec.preprocessing)
    whole = dataclasses.replace(preprocessing, decode="exact")
    here = functools.partial(decoded, preprocessing=whole, options=execution)
    values = _read(in_columns, execution, counts)
    few = dataclasses.replace(schedule, batch_size=schedule.decode_threads)
    images = _rows(values, _prepare_function(here, execution.isolate), few)
    rows = _crops(images, preprocessing, schedule, counts)
    if execution.on_error == "raise":
        rows = map(_raise_error, rows)
    boxes: list[tuple[Vector | None, str | None]] = []  # of the next image
    for group in _grouped(rows, schedule.batch_size):
        features = _features(group, engine, spec, np.stack, counts)
        complete = []
        for row, vector in zip(group, features, strict=True):
            if row.boxes is None:
                boxes.append((vector, _in_words(row)))
            else:
                complete.append((row, boxes))
                boxes = []
        if complete:
            yield _boxes_to_pandas(complete, execution.output, spec.layer_sizes)


def _crops(
    images: Iterator[Row], preprocessing: Preprocessing, schedule: Schedule, counts: Counts
) -> Iterator[Row]:
    """Yields a row for each box of an image, and then the row of the image without its pixels."""
    for image in images:
        _count([image], "images", counts)
        yield from _crops_of(image, preprocessing, schedule, counts)
        image = image._replace(input=None)  # also frees the pixels while the next is decoded
        yield image


def _crops_of(
    image: Row, preprocessing: Preprocessing, schedule: Schedule, counts: Counts
) -> Iterator[Row]:
    if image.input is None or image.boxes is None:
        return
    crop_box = functools.partial(crop, pixels=image.input, preprocessing=preprocessing)
    for row in _rows(iter(image.boxes), crop_box, schedule):
        counts["boxes" if row.error is None else "bad_boxes"] += 1
        counts["seconds.preprocess"] += row.preprocess_seconds
        yield row._replace(path=image.path)


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


def _read(values: Iterable[Value], execution: ExecutionOptions, counts: Counts) -> Iterator[Value]:
    read = read_ahead(
        values,
        execution.allowed_roots,
        execution.read_timeout_seconds,
        execution.formats,
        execution.max_bytes,
    )
    return _timed(read, counts)


def _prepare_function(here: Callable[[Value], Row], isolate: bool) -> Callable[[Value], Row]:
    decoding = isolated(here) if isolate else here

    def prepare_value(value: Value) -> Row:
        has_data = value.data is not None and not isinstance(value.data, ImageError)
        row = (decoding if has_data else here)(value)
        if row.error is None and value.boxes is None:
            return row
        return row._replace(path=value.path, boxes=value.boxes)

    return prepare_value


def _rows(
    values: Iterator[_T], prepare_value: Callable[[_T], Row], schedule: Schedule
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


def _split(vector: Vector, layer_sizes: dict[str, int]) -> dict[str, Vector]:
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
) -> list[Vector | None]:
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
    features: Sequence[Any],
    output: str,
    layer_sizes: dict[str, int] | None,
    split: Callable[[Any, dict[str, int]], dict[str, Any]] = _split,
) -> pd.Series | pd.DataFrame:
    vectors = pd.Series(features, dtype=object)
    if layer_sizes is not None:
        nulls = dict.fromkeys(layer_sizes)
        by_layer = [nulls if v is None else split(v, layer_sizes) for v in features]
        if output == "array":
            return pd.DataFrame(by_layer, columns=list(layer_sizes), dtype=object)
        vectors = pd.Series(by_layer, dtype=object)
    if output == "array":
        return vectors
    return pd.DataFrame(
        {
            "features": vectors,
            "error": pd.Series([_in_words(row) for row in group], dtype=object),
            "width": pd.array([row.width for row in group], dtype="Int32"),
            "height": pd.array([row.height for row in group], dtype="Int32"),
            "truncated": pd.array([row.truncated for row in group], dtype="boolean"),
        }
    )


def _in_words(row: Row) -> str | None:
    return str(row.error) if row.error else None


def _boxes_to_pandas(
    images: list[tuple[Row, list[tuple[Vector | None, str | None]]]],
    output: str,
    layer_sizes: dict[str, int] | None,
) -> pd.Series | pd.DataFrame:
    """Converts images, each with the vectors and errors of its boxes."""
    rows = [row for row, _ in images]
    features, errors = [], []
    for row, boxes in images:
        is_image = row.width is not None
        features.append([vector for vector, _ in boxes] if is_image else None)
        errors.append([error for _, error in boxes] if is_image else None)
    result = _to_pandas(rows, features, output, layer_sizes, _split_each)
    if output == "struct":
        result["box_errors"] = pd.Series(errors, dtype=object)
    return result


def _split_each(
    vectors: list[Vector | None], layer_sizes: dict[str, int]
) -> dict[str, list[Vector | None]]:
    """Splits the vectors of boxes: returns those of each layer."""
    nulls = dict.fromkeys(layer_sizes)
    split = [nulls if vector is None else _split(vector, layer_sizes) for vector in vectors]
    return {layer: [each[layer] for each in split] for layer in layer_sizes}
