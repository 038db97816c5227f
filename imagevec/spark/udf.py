"""The pandas UDF: the one place where Spark's rows meet the feature stream."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from pyspark import TaskContext
from pyspark.sql import Column, SparkSession
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    FloatType,
    IntegerType,
    StringType,
    StructField,
    StructType,
)

from imagevec.errors import OptionError, did_you_mean
from imagevec.images.values import ACCEPTED, IMAGE_FIELDS
from imagevec.plan import Recipe, resolve
from imagevec.runtime import get_engine, resolve_device, schedule
from imagevec.spark.metrics import Metrics
from imagevec.spark.ship import active_session, ship, shipped
from imagevec.spec import ExecutionOptions, FeatureSpec
from imagevec.stream import Counts, feature_stream
from imagevec.table.provenance import metadata_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from imagevec.spec import Options

logger = logging.getLogger(__name__)

_VECTOR = ArrayType(FloatType())


def features_udf(
    column: Column | str, *, metrics: Metrics | None = None, **options: Unpack[Options]
) -> Column:
    """A column of feature vectors of a column of images.

        df.withColumn("features", features_udf("content"))

    Args:
        column: Of type binary (encoded images) or string (paths or URIs), Spark's image struct, or
            a row struct of the binaryFile source.
        metrics: Where queries add up what they did.
        **options: See ``imagevec.spec.Options``.

    Returns:
        ``array<float>`` of ``num_features`` values, null for a null or bad image; or a struct, with
        several layers or ``output="struct"``. The column is called ``features``, and its metadata
        say what made it: see ``imagevec.fingerprint``. (Spark Connect loses them in
        ``withColumn``, not in ``select``.) It counts as not deterministic, so that Spark computes
        it once for each row even where rows are then filtered by it: filter by other columns
        before.

    Raises:
        OptionError: An option is wrong. The message names the nearest valid choice.
        WeightsError: The weights cannot be had, or do not fit the model.
    """
    session = active_session()
    resolved = resolve(**with_spark_gpus(session, options))
    return feature_column("features", column, session, *resolved, metrics)


def make_features_udf(*, metrics: Metrics | None = None, **options: Unpack[Options]) -> Any:
    """The pandas UDF of ``features_udf``, to use several times or to register for SQL.

        spark.udf.register("image_features", make_features_udf(model="resnet18"))

    It needs an active session, which ships the weights to the executors. Spark may compute it twice
    where rows are filtered by its result; its ``asNondeterministic()`` is computed once.
    """
    session = active_session()
    return udf_of(session, *resolve(**with_spark_gpus(session, options)), metrics)


def register(spark: SparkSession, name: str = "image_features", **options: Unpack[Options]) -> None:
    """Makes ``SELECT image_features(content) FROM photos`` work in a session.

    Args:
        spark: The session.
        name: Of the SQL function.
        **options: See ``imagevec.spec.Options``.

    Raises:
        OptionError: An option is wrong.
        WeightsError: The weights cannot be had, or do not fit the model.
    """
    spark.udf.register(name, udf_of(spark, *resolve(**with_spark_gpus(spark, options))))


def with_spark_gpus(session: SparkSession, options: Options) -> Options:
    """``device="auto"`` is ``"cuda"`` where tasks get GPUs: the driver may have none itself."""
    gpus_per_task = session.conf.get("spark.task.resource.gpu.amount", None)
    if options.get("device", "auto") == "auto" and gpus_per_task:
        return {**options, "device": "cuda"}
    return options


def feature_column(
    name: str,
    column: Column | str,
    session: SparkSession,
    recipe: Recipe,
    paths: tuple[Path, ...],
    execution: ExecutionOptions,
    metrics: Metrics | None,
) -> Column:
    """A column of features with its provenance, which Spark computes once for each row.

    A UDF that counts as deterministic is computed twice where rows are then filtered by its result:
    Spark evaluates it in the filter, which it pushes down, and again for the rows that are left.
    """
    image_features = udf_of(session, recipe, paths, execution, metrics).asNondeterministic()
    features: Column = image_features(column)
    return features.alias(name, metadata=metadata_of(recipe.spec))


def udf_of(
    session: SparkSession,
    recipe: Recipe,
    paths: tuple[Path, ...],
    execution: ExecutionOptions,
    metrics: Metrics | None = None,
) -> Any:
    """The pandas UDF of resolved options; ships the files."""
    if str(session.conf.get("spark.master", "")).split("[")[0] == "local":
        resolve_device(execution.device)  # the workers are on this machine: ask here
    for path in paths:
        ship(session, path)

    return_type = _return_type(recipe.spec, execution.output)

    @pandas_udf(return_type)  # type: ignore[untyped-decorator, call-overload]
    def image_features(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        # With a struct as the return type, Spark takes data frames for Series.
        yield from extract_in_worker(batches, recipe, execution, metrics)  # type: ignore[misc]

    return image_features


def _return_type(spec: FeatureSpec, output: str) -> DataType:
    features: DataType = _VECTOR
    if spec.layer_sizes is not None:
        features = StructType([StructField(layer, _VECTOR) for layer in spec.layer_sizes])
    if output == "array":
        return features
    return StructType(
        [
            StructField("features", features),
            StructField("error", StringType()),
            StructField("width", IntegerType()),
            StructField("height", IntegerType()),
        ]
    )


def check_input_column(schema: StructType, name: str) -> None:
    """Raises ``OptionError`` unless the schema has such a column, of an accepted type."""
    if name not in schema.names:
        raise OptionError(f"there is no column {name!r}: {did_you_mean(name, schema.names)}")
    kind = schema[name].dataType
    fields = set(kind.names) if isinstance(kind, StructType) else set()
    is_struct = fields >= set(IMAGE_FIELDS) or "content" in fields
    if not (isinstance(kind, BinaryType | StringType) or is_struct):
        raise OptionError(f"column {name!r} is of type {kind.simpleString()}: {ACCEPTED}")


def extract_in_worker(
    batches: Iterator[pd.Series],
    recipe: Recipe,
    execution: ExecutionOptions,
    metrics: Metrics | None = None,
) -> Iterator[pd.Series | pd.DataFrame]:
    """What runs in a Python worker, once a task."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    device = resolve_device(execution.device, gpu.addresses if gpu else ())
    plan = schedule(recipe, execution.batch_size, device, context.cpus() if context else 1)
    on_torch_cpu = recipe.engine == "torch" and device.type == "cpu"
    torch.set_num_threads(plan.forward_threads if on_torch_cpu else 1)
    engine = get_engine(recipe, shipped, device, plan.forward_threads)
    counts: Counts = defaultdict(float)
    yield from feature_stream(
        batches,
        engine,
        recipe.spec.preprocessing,
        execution,
        plan.batch_size,
        plan.decode_threads,
        plan.overlap,
        counts,
        recipe.spec.layer_sizes,
    )
    logger.debug("a task did %s", dict(counts))
    if metrics is not None:
        metrics.add(counts)
