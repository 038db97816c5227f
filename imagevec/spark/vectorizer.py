"""``ImageVectorizer``: one set of options, for data frames and for single images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from imagevec.plan import resolve
from imagevec.runtime import get_engine, resolve_device
from imagevec.stream import feature_stream, split

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from typing_extensions import Unpack

    from imagevec.spark.metrics import Metrics
    from imagevec.spec import FeatureSpec, Options


class ImageVectorizer:
    """Images to feature vectors. It holds options alone, so it can be pickled and used anywhere.

    Args:
        **options: See ``imagevec.spec.Options``.

    Raises:
        OptionError: An option is wrong. The message names the nearest valid choice.
        WeightsError: The weights cannot be had, or do not fit the model.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        self._options = options
        self._recipe, self._paths, self._execution = resolve(**options)

    @property
    def spec(self) -> FeatureSpec:
        """What fixes the numbers of its vectors."""
        return self._recipe.spec

    @property
    def num_features(self) -> int | dict[str, int]:
        """The length of a vector; of several layers, by name."""
        spec = self._recipe.spec
        return cast(int, spec.num_features) if spec.layer_sizes is None else spec.layer_sizes

    def process_images(
        self,
        df: DataFrame,
        input_col: str = "content",
        output_col: str = "features",
        metrics: Metrics | None = None,
    ) -> DataFrame:
        """The data frame with a column of feature vectors.

        Args:
            df: Has a column of images: binary, string, an image struct or a binaryFile row struct.
            input_col: The name of that column.
            output_col: The name of the new column.
            metrics: Where queries add up what they did.

        Raises:
            OptionError: The column is missing or of another type.
        """
        from pyspark.sql.functions import col

        from imagevec.spark.udf import check_input_column, feature_column, with_spark_gpus

        check_input_column(df.schema, input_col)
        options = with_spark_gpus(df.sparkSession, self._options)
        resolved = (self._recipe, self._paths, self._execution)
        if options != self._options:
            resolved = resolve(**options)
        quoted = "`" + input_col.replace("`", "``") + "`"  # else a dot is of a struct's field
        features = feature_column(output_col, col(quoted), df.sparkSession, *resolved, metrics)
        if output_col.lower() in (name.lower() for name in df.columns):  # it is to be replaced
            return df.withColumn(output_col, features)
        return df.select("*", features)  # Spark Connect's withColumn would lose the metadata

    def extract_features(self, image: bytes | str) -> list[float] | dict[str, list[float]] | None:
        """The feature vector of one image, in this process and without Spark.

        Args:
            image: The bytes of an image file, or a path or URI of one.

        Returns:
            ``num_features`` floats, or a dictionary of such lists if there are several layers;
            ``None`` for a bad image, unless ``on_error="raise"``.

        Raises:
            ImageError: The image is bad, with ``on_error="raise"``.
        """
        device = resolve_device(self._execution.device)
        engine = get_engine(self._recipe, self._locate, device, torch.get_num_threads())
        execution = dataclasses.replace(self._execution, output="array")
        batches = [pd.Series([image], dtype=object)]
        preprocessing = self._recipe.spec.preprocessing
        (features,) = feature_stream(batches, engine, preprocessing, execution, batch_size=1)
        vector: npt.NDArray[np.float32] | None = features.array[0]
        sizes = self._recipe.spec.layer_sizes
        if vector is None or sizes is None:
            return None if vector is None else vector.tolist()
        return {layer: part.tolist() for layer, part in split(vector, sizes).items()}

    def _locate(self, name: str) -> Path:
        return next(path for path in self._paths if path.name == name)
