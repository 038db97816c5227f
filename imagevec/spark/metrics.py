"""Counts of what queries process, which Spark's accumulators collect from the tasks."""

from __future__ import annotations

from collections import defaultdict

from pyspark.accumulators import AccumulatorParam

from imagevec.spark.sessions import active_session, is_connect
from imagevec.stream import Counts


class Metrics:
    """Counts what queries process: rows, errors, and the time of each step.

        metrics = Metrics()
        df.withColumn("features", features_udf("content", metrics=metrics)).write.parquet(...)
        metrics.value  # {"rows": 1000, "images": 997, "nulls": 1, "errors.corrupt": 2, ...}

    Tasks report when they end. A task that Spark runs twice, after a failure or for speculation,
    may count twice. A task that Spark stops early, because ``limit(3)`` or ``first()`` has enough
    rows, does not report. Spark Connect has no accumulators, so ``value`` stays empty.
    """

    def __init__(self) -> None:
        session = active_session()
        self._sum = None
        if not is_connect(session):
            self._sum = session.sparkContext.accumulator(defaultdict(float), _CountsParam())

    @property
    def value(self) -> dict[str, float]:
        """The sums over all tasks that have ended.

        - ``rows``: ``images`` + ``nulls`` + ``errors.<code>`` (codes of ``imagevec.ImageError``).
          For texts: ``texts`` + ``nulls``.
        - ``boxes`` and ``bad_boxes``, with the option ``boxes``: those that became vectors, and
          those that became nulls. ``images`` are then the decoded ones.
        - ``batches``: forward passes.
        - ``tasks``: tasks that reported.
        - ``tasks.float32_instead_of_bfloat16``: those whose processor has no bfloat16 instructions.
        - ``seconds.start`` (until the engine is loaded, once per worker), ``seconds.read`` (waiting
          for Spark's rows and for files), ``seconds.decode``, ``seconds.preprocess``,
          ``seconds.forward``: summed over all workers.
        - ``seconds.total``: summed over all tasks, from the first line of imagevec's code to the
          last. The part that no step covers is spent passing vectors to Spark. Spark's own time for
          a task is longer; the difference is Spark's overhead.
        """
        return {} if self._sum is None else dict(sorted(self._sum.value.items()))

    def add(self, counts: Counts) -> None:
        """Adds the counts of one task, on its worker."""
        if self._sum is not None:
            self._sum.add(counts)


class _CountsParam(AccumulatorParam[Counts]):
    def zero(self, value: Counts) -> Counts:
        return defaultdict(float)

    def addInPlace(self, value1: Counts, value2: Counts) -> Counts:
        for name, count in value2.items():
            value1[name] += count
        return value1
