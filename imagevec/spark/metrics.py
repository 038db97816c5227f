"""What queries did, in numbers that Spark's accumulators gather from the tasks."""

from __future__ import annotations

from collections import defaultdict

from pyspark.accumulators import AccumulatorParam

from imagevec.spark.sessions import active_session, is_connect
from imagevec.stream import Counts


class Metrics:
    """What the queries that were made with it did: rows, errors, and where the time went.

        metrics = Metrics()
        df.withColumn("features", features_udf("content", metrics=metrics)).write.parquet(...)
        metrics.value  # {"rows": 1000, "images": 997, "nulls": 1, "errors.corrupt": 2, ...}

    Tasks report when they end. A task that Spark runs twice, after a failure or for speculation,
    may count twice; one that Spark ends early, since ``limit(3)`` or ``first()`` has what it wants,
    does not report. Under Spark Connect there are no accumulators: ``value`` stays empty.
    """

    def __init__(self) -> None:
        session = active_session()
        self._sum = None
        if not is_connect(session):
            self._sum = session.sparkContext.accumulator(defaultdict(float), _CountsParam())

    @property
    def value(self) -> dict[str, float]:
        """The sums over all tasks that have ended.

        - ``rows`` are ``images`` + ``nulls`` + ``errors.<code>`` (of ``imagevec.ImageError``).
        - ``batches``: forward passes.
        - ``tasks``: those that reported.
        - ``seconds.start`` (until the engine is there, which a worker loads once),
          ``seconds.read`` (waiting for Spark's rows and for files), ``seconds.decode``,
          ``seconds.preprocess``, ``seconds.forward``: of the workers, added up.
        - ``seconds.total``: of the tasks, from their first line of imagevec to their last. What is
          not in the steps is handing over vectors. What is not in it either, and yet in the time
          that Spark shows for a task, is Spark's own.
        """
        return {} if self._sum is None else dict(sorted(self._sum.value.items()))

    def add(self, counts: Counts) -> None:
        """What one task did, from its worker."""
        if self._sum is not None:
            self._sum.add(counts)


class _CountsParam(AccumulatorParam[Counts]):
    def zero(self, value: Counts) -> Counts:
        return defaultdict(float)

    def addInPlace(self, value1: Counts, value2: Counts) -> Counts:
        for name, count in value2.items():
            value1[name] += count
        return value1
