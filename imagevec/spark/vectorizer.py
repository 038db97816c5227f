"""``ImageVectorizer``: one set of options for data frames and for single images."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from imagevec import cache
from imagevec.errors import OptionError
from imagevec.images.boxes import ACCEPTED_BOXES
from imagevec.images.values import Box
from imagevec.plan import Plan, has_cuda, make_plan
from imagevec.runtime import device_here, get_engine, schedule, threads_here
from imagevec.stream import Vector, box_stream, feature_stream

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from typing_extensions import Unpack

    from imagevec.options import Options
    from imagevec.spark.metrics import Metrics
    from imagevec.spec import FeatureSpec


class ImageVectorizer:
    """Computes feature vectors of images.

    It holds only options, so it can be pickled and used anywhere.

    Args:
        **options: See ``imagevec.options.Options``.

    Raises:
        OptionError: An option is invalid. The message suggests the nearest valid choice.
        WeightsError: The weights cannot be loaded, or do not fit the model.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        self._options = options
        self._gpus = _gpus_of_session()
        self._plan = make_plan(gpus=self._gpus, **options)

    @property
    def spec(self) -> FeatureSpec:
        """The specification that determines the vectors."""
        return self._plan.spec

    @property
    def num_features(self) -> int | dict[str, int]:
        """The length of a vector. With several layers, a dictionary from layer to length."""
        spec = self._plan.spec
        return cast(int, spec.num_features) if spec.layer_sizes is None else spec.layer_sizes

    def process_images(
        self,
        df: DataFrame,
        input_col: str = "content",
        output_col: str = "features",
        metrics: Metrics | None = None,
    ) -> DataFrame:
        """Returns the data frame with a column of feature vectors.

        Args:
            df: A data frame with a column of images, of a type that ``features_udf`` accepts.
            input_col: The name of that column.
            output_col: The name of the new column.
            metrics: A ``Metrics`` that counts what the queries process.

        Raises:
            OptionError: The column, or that of the boxes, is missing, or its type is not accepted.
        """
        from pyspark.sql.functions import col

        from imagevec.spark import sessions
        from imagevec.spark.udf import feature_column

        column = col(sessions.quoted(sessions.check_input_column(df.schema, input_col)))
        name = self._plan.execution.boxes
        boxes = None
        if name is not None:
            boxes = col(sessions.quoted(sessions.check_boxes_column(df.schema, name)))
        plan = self._plan_for(sessions.gpus_of_tasks(df.sparkSession))
        features = feature_column(output_col, column, df.sparkSession, plan, metrics, boxes)
        if sessions.find_column(df.columns, output_col):  # replace it
            return df.withColumn(output_col, features)
        return df.select("*", features)  # Spark Connect's withColumn would lose the metadata

    def extract_features(
        self, image: bytes | str, boxes: Sequence[Any] | None = None
    ) -> list[Any] | dict[str, list[Any]] | None:
        """Computes the feature vector of one image, in this process and without Spark.

        Args:
            image: The bytes of an image file, or its path or URI.
            boxes: Boxes in the image, ``(left, top, width, height)`` in pixels or mappings with
                these keys, to compute a vector for each; required if the option ``boxes`` is set.

        Returns:
            ``num_features`` floats. With boxes, a list with such a list for each, or ``None`` for a
            bad box. With several layers, a dictionary from layer to such a list.
            ``None`` for a bad image, unless ``on_error="raise"``.

        Raises:
            ImageError: The image or a box is bad, and ``on_error="raise"``.
            OptionError: The boxes are of another form, or missing.
        """
        plan = self._plan
        if boxes is None and plan.execution.boxes is not None:
            raise OptionError(
                f"boxes={plan.execution.boxes!r} is a column of data frames: give the boxes of the "
                "image, extract_features(image, boxes=[(left, top, width, height), ...])"
            )
        if not isinstance(boxes, Iterable | None):
            raise OptionError(f"the boxes are {boxes!r:.200}: {ACCEPTED_BOXES}")
        if plan.execution.device != "cpu" and not has_cuda():  # the driver of a cluster with GPUs
            plan = self._plan_for(None)
        device = device_here(plan.execution.device)
        how = dataclasses.replace(schedule(plan, device, threads_here()), decode_threads=1)
        engine = get_engine(plan, cache.stored, device, how.forward_threads)
        execution = dataclasses.replace(plan.execution, output="array")
        images = pd.Series([image], dtype=object)
        if boxes is None:
            (rows,) = feature_stream([images], engine, plan.spec, execution, how)
        else:
            column = pd.Series([[_box_of(box) for box in boxes]], dtype=object)
            (rows,) = box_stream([(images, column)], engine, plan.spec, execution, how)
        if plan.spec.layer_sizes is None:
            return _floats(rows.array[0])
        vectors = {layer: _floats(rows[layer].array[0]) for layer in plan.spec.layer_sizes}
        return None if None in vectors.values() else cast("dict[str, list[Any]]", vectors)

    def _plan_for(self, gpus: bool | None) -> Plan:
        """Returns the plan for tasks with or without GPUs."""
        return self._plan if gpus == self._gpus else make_plan(gpus=gpus, **self._options)


def _gpus_of_session() -> bool | None:
    """Returns ``gpus_of_tasks`` of the active session, if any, without importing PySpark."""
    if "pyspark.sql" not in sys.modules:
        return None
    from pyspark.sql import SparkSession

    from imagevec.spark.sessions import gpus_of_tasks

    session = SparkSession.getActiveSession()
    return gpus_of_tasks(session) if session is not None else None


def _floats(features: Vector | list[Vector | None] | None) -> list[Any] | None:
    """Converts a vector, or those of boxes, to floats."""
    if isinstance(features, list):
        return [_floats(vector) for vector in features]
    return None if features is None else features.tolist()


def _box_of(box: Any) -> Any:
    """Names the numbers of a tuple, list or array. A row of Spark is a tuple that has names."""
    if not isinstance(box, list | tuple | np.ndarray) or hasattr(box, "asDict"):
        return box
    return dict(zip(Box._fields, box, strict=False)) if len(box) == len(Box._fields) else box
