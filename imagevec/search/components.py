"""Computes connected components of a graph by joins on Spark. Each row is an edge."""

from __future__ import annotations

import contextlib
import logging

from pyspark import StorageLevel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from imagevec.errors import ImageVecError
from imagevec.spark.sessions import failures_in_words

_ROWS = 1 << 17  # per partition of the result; the session's default suits larger results

logger = logging.getLogger(__name__)

MAX_ROUNDS = 50  # about enough for a chain of 2**50: each round halves what is left


def components(edges: DataFrame) -> DataFrame:
    """Returns the members of all components of two or more, with the smallest member of each.

    Large-star and small-star alternate (Kiveris et al. 2014, "Connected Components in MapReduce and
    Beyond") until nothing changes, for at most ``MAX_ROUNDS``. A round shuffles the remaining edges
    twice.

    The result reads edges that are stored on the executors' disks until the session stops, unless
    the components are not found.

    Args:
        edges: A data frame with the columns ``a`` and ``b``, long.

    Returns:
        A data frame with the columns ``node`` and ``component``, long.
    """
    edges = edges.where("a <> b").select(
        F.greatest("a", "b").alias("u"), F.least("a", "b").alias("v")
    )
    with failures_in_words(), contextlib.ExitStack() as persisted:
        now = _persist(edges.distinct(), persisted)
        before = _state(now)
        for round in range(MAX_ROUNDS):
            with persisted.pop_all():  # the edges of the round before
                now = _persist(_small_star(_large_star(now)), persisted)
                state = _state(now)
            if state == before:
                persisted.pop_all()  # the result reads them
                logger.info("connected components: %d edges, %d rounds", state[0], round + 1)
                stars = now.select(F.col("u").alias("node"), F.col("v").alias("component"))
                centres = now.select(F.col("v").alias("node"), F.col("v").alias("component"))
                partitions = max(1, 2 * state[0] // _ROWS)
                return stars.union(centres.distinct()).coalesce(partitions)
            before = state
        raise ImageVecError(f"the connected components did not converge in {MAX_ROUNDS} rounds")


def _persist(edges: DataFrame, persisted: contextlib.ExitStack) -> DataFrame:
    """Stores edges on the executors' disks, until the stack is closed."""
    persisted.callback(edges.unpersist)
    return edges.persist(StorageLevel.DISK_ONLY)


def _state(edges: DataFrame) -> tuple[int, ...]:
    """Returns a state that is equal for equal sets of edges."""
    found = edges.agg(
        F.count("*"),
        F.coalesce(F.sum(F.xxhash64("u", "v").cast("decimal(20)")), F.lit(0)),
    ).first()
    assert found is not None, "an aggregate has a row"
    return int(found[0]), int(found[1])


# A round uses the edges once: plans that use them twice would double with each round.


def _large_star(edges: DataFrame) -> DataFrame:
    """Links each node's larger neighbours with the smallest one, or with itself."""
    both = _each_of(edges, ("u", "v"), ("v", "u"))
    smallest = F.least(F.min("v").over(Window.partitionBy("u")), "u")
    stars = both.withColumn("least", smallest).where("v > u")
    return stars.select(F.col("v").alias("u"), F.col("least").alias("v")).distinct()


def _small_star(edges: DataFrame) -> DataFrame:
    """Links each node and its smaller neighbours with the smallest one. Edges point downwards."""
    stars = edges.withColumn("least", F.min("v").over(Window.partitionBy("u")))
    return _each_of(stars, ("v", "least"), ("u", "least")).where("u <> v").distinct()


def _each_of(edges: DataFrame, *pairs: tuple[str, str]) -> DataFrame:
    """Returns several edges per row: ``u`` and ``v`` from these pairs of columns."""
    made = F.array(*(F.struct(F.col(u).alias("u"), F.col(v).alias("v")) for u, v in pairs))
    return edges.select(F.explode(made).alias("edge")).select("edge.u", "edge.v")
