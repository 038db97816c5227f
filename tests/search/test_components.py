"""Connected components by joins, beside those that a set of parents finds."""

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from imagevec import ImageVecError
from imagevec.search.components import components


def found(spark: SparkSession, edges: list[tuple[int, int]]) -> dict[int, int]:
    rows = components(spark.createDataFrame(edges, "a long, b long")).collect()
    assert len({row.node for row in rows}) == len(rows)
    return {row.node: row.component for row in rows}


def expected(edges: list[tuple[int, int]]) -> dict[int, int]:
    least = {node: node for edge in edges for node in edge if edge[0] != edge[1]}
    while True:
        before = dict(least)
        for a, b in edges:
            if a != b:
                least[a] = least[b] = min(least[a], least[b])
        if least == before:
            return least


@pytest.mark.parametrize("seed", range(3))
def test_components_of_random_edges(spark: SparkSession, seed: int) -> None:
    edges = np.random.default_rng(seed).integers(0, 120, (70, 2)).tolist()
    assert found(spark, edges) == expected(edges)


def test_a_long_chain_takes_many_rounds(spark: SparkSession) -> None:
    """The plans of ten rounds stay small enough to run."""
    order = np.random.default_rng(0).permutation(300).tolist()
    edges = list(zip(order, order[1:], strict=False))
    assert found(spark, edges) == dict.fromkeys(range(300), 0)


def test_failure_leaves_no_stored_edges(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(spark.sparkContext._jsc.getPersistentRDDs())
    monkeypatch.setattr("imagevec.search.components.MAX_ROUNDS", 2)
    edges = spark.createDataFrame([(node, node + 1) for node in range(300)], "a long, b long")
    with pytest.raises(ImageVecError, match="did not converge in 2 rounds"):
        components(edges)
    bad = edges.withColumn("a", F.raise_error(F.lit("the table is gone")).cast("long"))
    with pytest.raises(ImageVecError, match="the table is gone"):
        components(bad)
    assert set(spark.sparkContext._jsc.getPersistentRDDs()) <= before
