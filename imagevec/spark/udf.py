"""The pandas UDF, which connects Spark's rows to the feature stream.

``features_udf`` returns a column, ``make_features_udf`` a function of columns, and ``register``
adds a SQL function. The column is nondeterministic, so Spark computes it once per row. Spark would
compute a deterministic UDF twice if rows are filtered by its result: in the filter, which it pushes
down, and again for the remaining rows. The functions are deterministic, because SQL allows no other
functions inside aggregates, and because Spark then moves other filters before them.
``make_features_udf().asNondeterministic()`` is computed once per row.
"""

from __future__ import annotations

import contextlib
import logging
import re
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
    BooleanType,
    DataType,
    FloatType,
    IntegerType,
    StringType,
    StructField,
    StructType,
)

from imagevec.errors import ImageVecError, MissingExtraError
from imagevec.plan import Plan, make_plan
from imagevec.runtime import (
    device_here,
    freeze_heap,
    get_engine,
    get_tokenizer,
    precision_here,
    schedule,
)
from imagevec.spark.metrics import Metrics
from imagevec.spark.sessions import (
    INSTALL_THERE,
    MORE_MEMORY,
    active_session,
    gpus_of_tasks,
    is_local,
)
from imagevec.spark.ship import ship, shipped
from imagevec.spec import ExecutionOptions, FeatureSpec, Tokenization
from imagevec.stream import Counts, box_stream, feature_stream, text_stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from imagevec.options import Options

logger = logging.getLogger(__name__)

_VECTOR = ArrayType(FloatType())
# Of Python, the C library, PyTorch and OpenVINO.
_LACK_OF_MEMORY = (
    "can't start new thread|[Cc]annot allocate memory|can't allocate memory|failed to map segment"
    "|bad.alloc"
)


def features_udf(
    column: Column | str, *, metrics: Metrics | None = None, **options: Unpack[Options]
) -> Column:
    """Returns a column of feature vectors for a column of images.

        df.withColumn("features", features_udf("content"))

    With ``boxes``, each image is decoded once, and each of its boxes gets a vector, as if the image
    had been cropped first:

        df.withColumn("features", features_udf("content", boxes="boxes"))

    Args:
        column: A column of type binary (encoded images) or string (paths or URIs), Spark's image
            struct, a row struct of the binaryFile source, or a struct of ``bytes`` and ``path``,
            as in Hugging Face's Parquet files. If ``bytes`` is null, ``path`` is read.
        metrics: A ``Metrics`` that counts what the queries process.
        **options: See ``imagevec.options.Options``. ``boxes`` may also be a ``Column``.

    Returns:
        ``array<float>`` of ``num_features`` values, or null for a null or bad image. With
        ``boxes``, ``array<array<float>>`` of the same length and order as the boxes, with a null
        for a bad box; or null if the image is bad or one of the columns is null. With several
        layers or ``output="struct"``, a struct. The column is named ``features``, and its metadata
        describes how it was computed: see ``imagevec.provenance``. (On Spark Connect,
        ``withColumn`` drops the metadata; ``select`` keeps it.) The column is nondeterministic:
        Spark computes it once per row, even if rows are then filtered by it. Filter by other
        columns first.

    Raises:
        OptionError: An option is invalid. The message suggests the nearest valid choice.
        WeightsError: The weights cannot be loaded, or do not fit the model.
    """
    session = active_session()
    boxes = options.get("boxes")
    if hasattr(boxes, "alias"):  # a Column, of which PySpark 3.5 has two classes
        options["boxes"] = "boxes"
    plan = make_plan(gpus=gpus_of_tasks(session), **options)
    return feature_column("features", column, session, plan, metrics, boxes)


def make_features_udf(*, metrics: Metrics | None = None, **options: Unpack[Options]) -> Any:
    """Returns the pandas UDF behind ``features_udf``, to use several times or register for SQL.

        spark.udf.register("image_features", make_features_udf(model="resnet18"))

    With ``boxes``, it takes two columns, images and boxes, and the value of ``boxes`` only says so.

    It requires an active session, which ships the weights to the executors. If rows are filtered by
    its result, Spark may compute it twice. ``asNondeterministic()`` on the UDF prevents this.
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
    """Registers a SQL function for ``SELECT image_features(content) FROM photos``.

    With ``boxes``, it takes two columns: ``SELECT image_features(content, boxes) FROM photos``.
    If rows are filtered by its result, Spark may compute it twice.

    Args:
        spark: The session.
        name: The name of the SQL function.
        metrics: A ``Metrics`` that counts what the queries process.
        **options: See ``imagevec.options.Options``.

    Raises:
        OptionError: An option is invalid.
        WeightsError: The weights cannot be loaded, or do not fit the model.
    """
    plan = make_plan(gpus=gpus_of_tasks(spark), **options)
    spark.udf.register(name, udf_of(spark, plan, metrics))


def feature_column(
    name: str,
    column: Column | str,
    session: SparkSession,
    plan: Plan,
    metrics: Metrics | None,
    boxes: Column | str | None = None,
) -> Column:
    """Returns a column of features with its provenance, which Spark computes once per row."""
    columns = (column,) if boxes is None else (column, boxes)
    features: Column = udf_of(session, plan, metrics).asNondeterministic()(*columns)
    return features.alias(name, metadata=plan.spec.metadata)


def udf_of(session: SparkSession, plan: Plan, metrics: Metrics | None = None) -> Any:
    """Returns the pandas UDF of a plan, and ships the plan's files."""
    send(session, plan)
    return_type = _return_type(plan.spec, plan.execution)

    # If the return type is a struct, Spark accepts data frames in place of Series.
    def image_features(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        yield from extract_in_worker(batches, plan, metrics)  # type: ignore[misc]

    def box_features(batches: Iterator[tuple[pd.Series, pd.Series]]) -> Iterator[pd.Series]:
        yield from extract_in_worker(batches, plan, metrics)  # type: ignore[misc]

    function: Any = image_features if plan.execution.boxes is None else box_features
    return pandas_udf(function, return_type)  # type: ignore[call-overload]


def send(session: SparkSession, plan: Plan) -> None:
    """Ships a plan's files to the workers. Warns if they run here without the instructions."""
    if is_local(session):
        precision_here(plan, device_here(plan.execution.device))
    ship(session, plan)


def _return_type(spec: FeatureSpec, execution: ExecutionOptions) -> DataType:
    vector = _VECTOR if execution.boxes is None else ArrayType(_VECTOR)
    features: DataType = vector
    if spec.layer_sizes is not None:
        features = StructType([StructField(layer, vector) for layer in spec.layer_sizes])
    if execution.output == "array":
        return features
    fields = [
        StructField("features", features),
        StructField("error", StringType()),
        StructField("width", IntegerType()),
        StructField("height", IntegerType()),
        StructField("truncated", BooleanType()),
    ]
    if execution.boxes is not None:
        fields.append(StructField("box_errors", ArrayType(StringType())))
    return StructType(fields)


def extract_in_worker(
    batches: Iterator[Any], plan: Plan, metrics: Metrics | None = None
) -> Iterator[pd.Series | pd.DataFrame]:
    """Computes one task's features, in a Python worker.

    Args:
        batches: The Arrow batches of the columns, as Spark passes them to a pandas UDF.
        plan: The plan.
        metrics: A ``Metrics`` that counts what the task processes.

    Raises:
        ImageVecError: The worker lacks memory, processes or a package.
    """
    with _explained():
        yield from _extract(batches, plan, metrics)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Names the worker's lacks, which each library reports in its own words."""
    try:
        yield
    except MissingExtraError as error:
        raise ImageVecError(f"on a worker, {error}. Or {INSTALL_THERE}") from error
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or re.search(_LACK_OF_MEMORY, text):
            reason = text.partition("\n")[0] or type(error).__name__
            raise ImageVecError(
                f"a worker has too little memory ({reason}): {MORE_MEMORY}"
            ) from error
        raise


def _extract(
    batches: Iterator[Any], plan: Plan, metrics: Metrics | None
) -> Iterator[pd.Series | pd.DataFrame]:
    start = time.perf_counter()
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    device = device_here(plan.execution.device, gpu.addresses if gpu else ())
    how = schedule(plan, device, context.cpus() if context else 1)
    engine = get_engine(plan, shipped, device, how.forward_threads, when_built=freeze_heap)
    counts: Counts = defaultdict(float, {"tasks": 1, "seconds.start": time.perf_counter() - start})
    if precision_here(plan, device) != plan.spec.precision:
        counts["tasks.float32_instead_of_bfloat16"] = 1
    if isinstance(plan.spec.preprocessing, Tokenization):
        tokenizer = get_tokenizer(plan, shipped)
        yield from text_stream(batches, engine, plan.spec, tokenizer, how, counts)
    else:
        stream = feature_stream if plan.execution.boxes is None else box_stream
        yield from stream(batches, engine, plan.spec, plan.execution, how, counts)
    counts["seconds.total"] = time.perf_counter() - start
    logger.debug("task counts: %s", dict(counts))
    if metrics is not None:
        metrics.add(counts)
