"""What queries did, in numbers that Spark's accumulators gather from the tasks."""

from __future__ import annotations

from collections import defaultdict

from pyspark.accumulators import AccumulatorParam

from imagevec.spark.ship import active_session
from imagevec.stream import Counts


class Metrics:
    """What the queries that were made with it did: rows, errors, and where the time went.

        metrics = Metrics()
        df.withColumn("features", features_udf("content", metrics=metrics)).write.parquet(...)
        metrics.value  # {"rows": 1000, "images": 997, "nulls": 1, "errors.corrupt": 2, ...}

    Tasks report when they end. A task that Spark runs twice, after a failure or for speculation,
    may count twice. Under Spark Connect there are no accumulators: ``value`` stays empty.
    """

    def __init__(self) -> None:
        session = active_session()
        self._sum = None
        if hasattr(session, "_jsc"):  # not under Spark Connect
            self._sum = session.sparkContext.accumulator(defaultdict(float), _CountsParam())

    @property
    def value(self) -> dict[str, float]:
        """The sums over all tasks that have ended.

        - ``rows`` are ``images`` + ``nulls`` + ``errors.<code>`` (of ``imagevec.ImageError``).
        - ``batches``: forward passes.
        - ``seconds.read`` (waiting for Spark's rows and for files), ``seconds.decode``,
          ``seconds.preprocess``, ``seconds.forward``: of the workers, added up.
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
