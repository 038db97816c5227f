"""The pandas UDF: the one place where Spark's rows meet the feature stream.

``features_udf`` gives a column, ``make_features_udf`` a function of columns, and ``register`` a
function of SQL. They differ in one thing more. The column counts as not deterministic, so that
Spark computes it once for each row: a deterministic UDF is computed twice where rows are then
filtered by its result, in the filter, which is pushed down, and again for the rows that are left.
The functions are ordinary, deterministic ones: SQL does not allow others inside of aggregates, and
moves other filters before them. ``make_features_udf().asNondeterministic()`` is computed once, too.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd
from pyspark import TaskContext
from pyspark.sql import Column, SparkSession
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import (
    ArrayType,
    DataType,
    FloatType,
    IntegerType,
    StringType,
    StructField,
    StructType,
)

from imagevec.plan import Plan, make_plan
from imagevec.runtime import device_here, freeze_heap, get_engine, get_tokenizer, schedule
from imagevec.spark.metrics import Metrics
from imagevec.spark.sessions import active_session, gpus_of_tasks, is_local
from imagevec.spark.ship import ship, shipped
from imagevec.spec import FeatureSpec, Tokenization
from imagevec.stream import Counts, feature_stream, text_stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from imagevec.options import Options

logger = logging.getLogger(__name__)

_VECTOR = ArrayType(FloatType())


def features_udf(
    column: Column | str, *, metrics: Metrics | None = None, **options: Unpack[Options]
) -> Column:
    """A column of feature vectors of a column of images.

        df.withColumn("features", features_udf("content"))

    Args:
        column: Of type binary (encoded images) or string (paths or URIs), Spark's image struct, or
            a row struct of the binaryFile source, or a struct of ``bytes`` and ``path``, as in
            Hugging Face's Parquet files: where ``bytes`` is null, ``path`` is read.
        metrics: Where queries add up what they did.
        **options: See ``imagevec.options.Options``.

    Returns:
        ``array<float>`` of ``num_features`` values, null for a null or bad image; or a struct, with
        several layers or ``output="struct"``. The column is called ``features``, and its metadata
        say what made it: see ``imagevec.provenance``. (Spark Connect loses them in
        ``withColumn``, not in ``select``.) It counts as not deterministic, so that Spark computes
        it once for each row even where rows are then filtered by it: filter by other columns
        before.

    Raises:
        OptionError: An option is wrong. The message names the nearest valid choice.
        WeightsError: The weights cannot be had, or do not fit the model.
    """
    session = active_session()
    plan = make_plan(gpus=gpus_of_tasks(session), **options)
    return feature_column("features", column, session, plan, metrics)


def make_features_udf(*, metrics: Metrics | None = None, **options: Unpack[Options]) -> Any:
    """The pandas UDF of ``features_udf``, to use several times or to register for SQL.

        spark.udf.register("image_features", make_features_udf(model="resnet18"))

    It needs an active session, which ships the weights to the executors. Spark may compute it twice
    where rows are filtered by its result; its ``asNondeterministic()`` is computed once.
    """
    session = active_session()
    return udf_of(session, make_plan(gpus=gpus_of_tasks(session), **options), metrics)


def register(
    spark: SparkSession,
    name: str = "image_features",
    *,
    metrics: Metrics | None = None,
    **options: Unpack[Options],
) -> None:
    """Makes ``SELECT image_features(content) FROM photos`` work in a session.

    Args:
        spark: The session.
        name: Of the SQL function. Spark may compute it twice where rows are filtered by its result.
        metrics: Where queries add up what they did.
        **options: See ``imagevec.options.Options``.

    Raises:
        OptionError: An option is wrong.
        WeightsError: The weights cannot be had, or do not fit the model.
    """
    plan = make_plan(gpus=gpus_of_tasks(spark), **options)
    spark.udf.register(name, udf_of(spark, plan, metrics))


def feature_column(
    name: str, column: Column | str, session: SparkSession, plan: Plan, metrics: Metrics | None
) -> Column:
    """A column of features with its provenance, which Spark computes once for each row."""
    features: Column = udf_of(session, plan, metrics).asNondeterministic()(column)
    return features.alias(name, metadata=plan.spec.metadata)


def udf_of(session: SparkSession, plan: Plan, metrics: Metrics | None = None) -> Any:
    """The pandas UDF of a plan, whose files it ships."""
    if is_local(session):
        device_here(plan.execution.device)  # the workers are on this machine: ask here
    ship(session, plan)

    return_type = _return_type(plan.spec, plan.execution.output)

    @pandas_udf(return_type)  # type: ignore[untyped-decorator, call-overload]
    def image_features(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        # With a struct as the return type, Spark takes data frames for Series.
        yield from extract_in_worker(batches, plan, metrics)  # type: ignore[misc]

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


def extract_in_worker(
    batches: Iterator[pd.Series], plan: Plan, metrics: Metrics | None = None
) -> Iterator[pd.Series | pd.DataFrame]:
    """What runs in a Python worker, once a task."""
    start = time.perf_counter()
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    device = device_here(plan.execution.device, gpu.addresses if gpu else ())
    how = schedule(plan, device, context.cpus() if context else 1)
    engine = get_engine(plan, shipped, device, how.forward_threads, when_built=freeze_heap)
    counts: Counts = defaultdict(float, {"tasks": 1, "seconds.start": time.perf_counter() - start})
    if isinstance(plan.spec.preprocessing, Tokenization):
        yield from text_stream(batches, engine, get_tokenizer(plan, shipped), how, counts)
    else:
        yield from feature_stream(batches, engine, plan.spec, plan.execution, how, counts)
    counts["seconds.total"] = time.perf_counter() - start
    logger.debug("a task did %s", dict(counts))
    if metrics is not None:
        metrics.add(counts)
