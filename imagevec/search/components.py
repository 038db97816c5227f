"""Connected components of a graph whose edges are rows, by joins on Spark."""

from __future__ import annotations

import logging

from pyspark import StorageLevel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from imagevec.errors import ImageVecError
from imagevec.spark.sessions import failures_in_words

_ROWS = 1 << 17  # of a partition of the result; a session's number of them is for larger ones

logger = logging.getLogger(__name__)

MAX_ROUNDS = 50  # as many as a chain of 2**50 could need, about: each round halves what is left


def components(edges: DataFrame) -> DataFrame:
    """The members of all components of two or more, each with its smallest member.

    Large-star and small-star in turns (Kiveris et al. 2014, "Connected Components in MapReduce and
    Beyond"), until nothing changes. A round is two shuffles of what is left; no more than
    ``MAX_ROUNDS``.

    Args:
        edges: ``a`` and ``b``, long.

    Returns:
        ``node`` and ``component``, long.
    """
    edges = edges.where("a <> b").select(
        F.greatest("a", "b").alias("u"), F.least("a", "b").alias("v")
    )
    with failures_in_words():
        now = edges.distinct().persist(StorageLevel.DISK_ONLY)
        before = _state(now)
        for round in range(MAX_ROUNDS):
            then, now = now, _small_star(_large_star(now)).persist(StorageLevel.DISK_ONLY)
            state = _state(now)
            then.unpersist()
            if state == before:
                logger.info("connected components: %d edges, %d rounds", state[0], round + 1)
                stars = now.select(F.col("u").alias("node"), F.col("v").alias("component"))
                centres = now.select(F.col("v").alias("node"), F.col("v").alias("component"))
                partitions = max(1, 2 * state[0] // _ROWS)
                return stars.union(centres.distinct()).coalesce(partitions)
            before = state
    raise ImageVecError(f"components were not connected after {MAX_ROUNDS} rounds")


def _state(edges: DataFrame) -> tuple[int, ...]:
    """Equal for two sets of edges that are the same."""
    found = edges.agg(
        F.count("*"),
        F.coalesce(F.sum(F.xxhash64("u", "v").cast("decimal(20)")), F.lit(0)),
    ).first()
    assert found is not None, "an aggregate has a row"
    return int(found[0]), int(found[1])


# A round reads the edges once: plans that name them twice would double with each round.


def _large_star(edges: DataFrame) -> DataFrame:
    """Links each node's larger neighbours with the smallest one, or with itself."""
    both = _each_of(edges, ("u", "v"), ("v", "u"))
    smallest = F.least(F.min("v").over(Window.partitionBy("u")), "u")
    stars = both.withColumn("least", smallest).where("v > u")
    return stars.select(F.col("v").alias("u"), F.col("least").alias("v")).distinct()


def _small_star(edges: DataFrame) -> DataFrame:
    """Links each node and its smaller neighbours with the smallest one. Edges lead downwards."""
    stars = edges.withColumn("least", F.min("v").over(Window.partitionBy("u")))
    return _each_of(stars, ("v", "least"), ("u", "least")).where("u <> v").distinct()


def _each_of(edges: DataFrame, *pairs: tuple[str, str]) -> DataFrame:
    """Several edges for each row: ``u`` and ``v`` from these pairs of columns."""
    made = F.array(*(F.struct(F.col(u).alias("u"), F.col(v).alias("v")) for u, v in pairs))
    return edges.select(F.explode(made).alias("edge")).select("edge.u", "edge.v")
