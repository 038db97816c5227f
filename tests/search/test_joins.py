from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark import SparkFiles
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec import (
    FingerprintError,
    ImageVecError,
    ImageVectorizer,
    MissingExtraError,
    OptionError,
    near_duplicates,
    nearest,
)
from imagevec.search import neighbours
from imagevec.search.joins import _pairs_of_blocks, _shuffles_little
from imagevec.search.vectors import count_keys, keyed
from tests.helpers.factories import tiny

WIDTH = 8
Vectors = np.ndarray | Sequence[Any]  # with None where a row has none


def vectors_of(count: int, seed: int = 0, kinds: int | None = None) -> np.ndarray:
    """float32 ``(count, WIDTH)``; of few kinds, many are copies, or copies of another length."""
    chance = np.random.default_rng(seed)
    vectors = chance.standard_normal((count, WIDTH), np.float32)
    if kinds is not None:
        vectors = vectors[chance.integers(0, min(kinds, count), count)]
        vectors *= chance.choice([1, 2], (count, 1)).astype(np.float32)
    return vectors


def table(
    spark: SparkSession,
    vectors: Vectors,
    *,
    prefix: str = "p",
    partitions: int = 2,
    seed: int = 0,
) -> DataFrame:
    """Rows in any order, with keys in the order of the vectors."""
    rows = [
        (f"{prefix}{place:04d}", None if vector is None else [float(x) for x in vector])
        for place, vector in enumerate(vectors)
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    there = spark.sparkContext.parallelize([rows[place] for place in order], partitions)
    return spark.createDataFrame(there, "path string, features array<float>")


def found(result: DataFrame) -> dict[str, list[tuple[str, float]]]:
    """Of each query its neighbours and cosines, by rank."""
    rows = defaultdict(list)
    for row in sorted(result.collect(), key=lambda row: (row.query, row.rank)):
        rows[row.query].append((row.neighbour, row.cosine))
        assert row.rank == len(rows[row.query])
    return dict(rows)


def expected(
    queries: Vectors, vectors: Vectors, k: int, prefix: str = "q"
) -> dict[str, list[tuple[str, float]]]:
    """What one process finds."""
    asked = [place for place, vector in enumerate(queries) if vector is not None]
    there = [place for place, vector in enumerate(vectors) if vector is not None]
    if not asked or not there:
        return {}
    of_asked, of_there = (
        np.array([side[place] for place in places], np.float32)
        for side, places in ((queries, asked), (vectors, there))
    )
    indices, cosines = neighbours.nearest(of_asked, of_there, k)
    return {
        f"{prefix}{place:04d}": [
            (f"p{there[index]:04d}", float(cosine))
            for index, cosine in zip(indices[row], cosines[row], strict=True)
        ]
        for row, place in enumerate(asked)
    }


def groups_of(result: DataFrame) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for row in result.collect():
        groups[row.group].append(row.path)
    return {group: sorted(paths) for group, paths in groups.items()}


def expected_groups(vectors: np.ndarray, min_cosine: float) -> dict[str, list[str]]:
    return {
        f"p{group[0]:04d}": [f"p{place:04d}" for place in group]
        for group in neighbours.near_duplicates(vectors, min_cosine)
    }


A_SIDE = st.tuples(st.integers(1, 40), st.integers(0, 99), st.integers(1, 20), st.integers(1, 5))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(A_SIDE, A_SIDE, st.integers(1, 45), st.floats(0, 0.5))
def test_any_partitioning_any_k_ties_and_nulls(
    spark: SparkSession, asked: Any, there: Any, k: int, nulls: float
) -> None:
    """The same result, to the bit, as of one process, whichever side is the smaller one."""
    sides = []
    for count, seed, kinds, _ in (asked, there):
        none = np.random.default_rng(seed).random(count) < nulls
        vectors = vectors_of(count, seed % 3, kinds)
        vectors[::9] = 0
        sides.append([None if no else vector for no, vector in zip(none, vectors, strict=True)])
    queries = table(spark, sides[0], prefix="q", partitions=asked[3], seed=asked[1])
    features = table(spark, sides[1], partitions=there[3], seed=there[1])
    assert found(nearest(queries, features, k)) == expected(sides[0], sides[1], k)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(A_SIDE, st.sampled_from([0.5, 0.9, 0.999, 1.0]))
def test_groups_of_any_partitioning(spark: SparkSession, there: Any, min_cosine: float) -> None:
    count, seed, kinds, partitions = there
    vectors = vectors_of(count, seed, kinds)
    features = table(spark, vectors, partitions=partitions, seed=seed)
    assert groups_of(near_duplicates(features, min_cosine)) == expected_groups(vectors, min_cosine)


def test_blocks_of_rows_are_compared_in_pairs(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagevec.search.joins._DUPLICATE_ROWS", 7)
    assert len(_pairs_of_blocks(50)) == 36
    vectors = vectors_of(50, kinds=20)
    features = table(spark, vectors)
    assert groups_of(near_duplicates(features)) == expected_groups(vectors, 0.95)


def test_a_chain_is_one_group(spark: SparkSession) -> None:
    """Its ends are opposite, and its order is not that of the keys."""
    angles = np.radians(np.linspace(0, 180, 60))[np.random.default_rng(1).permutation(60)]
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    groups = groups_of(near_duplicates(table(spark, chain), 0.998))
    assert groups == {"p0000": [f"p{place:04d}" for place in range(60)]}


def test_queries_that_are_the_same_table(spark: SparkSession) -> None:
    vectors = vectors_of(30)
    features = table(spark, vectors)
    result = found(nearest(features, features, 3))
    assert result == expected(vectors, vectors, 3, prefix="p")
    assert all(neighbours[0] == (query, 1) for query, neighbours in result.items())


def test_the_result_is_typed(spark: SparkSession) -> None:
    features = table(spark, vectors_of(3))
    numbered = features.select(F.substring("path", 2, 9).cast("long").alias("ID"), "features")
    result = nearest(numbered, numbered, 2, key="id")
    types = [(field.name, field.dataType.simpleString()) for field in result.schema]
    assert types == [
        ("query", "bigint"),
        ("neighbour", "bigint"),
        ("rank", "int"),
        ("cosine", "float"),
    ]
    groups = near_duplicates(numbered, 0.01, key="id")
    assert [field.name for field in groups.schema] == ["ID", "group"]
    assert groups.schema["group"].dataType.simpleString() == "bigint"


@pytest.mark.parametrize("kind", ["double", "vector", "binary key", "int key"])
def test_types_that_are_taken(spark: SparkSession, kind: str) -> None:
    vectors = vectors_of(12)
    features = table(spark, vectors)
    if kind == "double":
        features = features.withColumn("features", F.col("features").cast("array<double>"))
    elif kind == "vector":
        doubles = F.col("features").cast("array<double>")
        features = features.withColumn("features", array_to_vector(doubles))
    elif kind == "binary key":
        features = features.withColumn("path", F.col("path").cast("binary"))
    else:
        features = features.withColumn("path", F.substring("path", 2, 9).cast("int"))
    rows = nearest(features, features, 4).orderBy("query", "rank").collect()
    indices, cosines = neighbours.nearest(vectors, vectors, 4)
    assert [row.cosine for row in rows] == cosines.ravel().tolist()
    paths = [row.path for row in features.orderBy("path").collect()]
    assert [row.neighbour for row in rows] == [paths[index] for index in indices.ravel()]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_vectors_without_a_direction(spark: SparkSession, bad: float) -> None:
    features = table(spark, [[1, 0], [0, 1], [bad, 0]])
    assert found(nearest(features, features, 3))["p0002"] == [
        ("p0000", 0),
        ("p0001", 0),
        ("p0002", 0),
    ]
    assert groups_of(near_duplicates(features, 0.01)) == {}


@pytest.mark.parametrize("method", ["exact", "clustered"])
def test_null_vectors_alone(spark: SparkSession, method: Any) -> None:
    if method == "clustered":
        pytest.importorskip("faiss")
    some, none = table(spark, vectors_of(5)), table(spark, [None] * 3)
    for queries, features in ((some, none), (none, some), (none, none)):
        assert nearest(queries, features, 2, method=method).collect() == []
    assert near_duplicates(none, method=method).collect() == []


def test_no_rows(spark: SparkSession) -> None:
    some, none = table(spark, vectors_of(5)), table(spark, [None]).limit(0)
    with pytest.raises(OptionError, match="there are no vectors to search"):
        nearest(some, none)
    assert nearest(none, some).collect() == []
    assert near_duplicates(none).collect() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "k=0 is not valid"),
        ({"k": 1.5}, "k=1.5 is not valid"),
        ({"k": True}, "k=True is not valid"),
        ({"key": "pth"}, "did you mean 'path'"),
        ({"column": "vectors"}, "there is no column 'vectors'"),
        ({"column": "path"}, "is of type string: use an array of floats"),
        ({"key": "features"}, "the key 'features' is of type array<float>"),
        ({"method": "hnsw"}, "choose one of 'clustered', 'exact'"),
        ({"recall": 0}, "recall=0 is not valid"),
        ({"recall": 1.1}, "recall=1.1 is not valid"),
    ],
)
def test_wrong_options(spark: SparkSession, options: dict[str, Any], said: str) -> None:
    features = table(spark, vectors_of(3))
    with pytest.raises(OptionError, match=said):
        nearest(features, features, **options)


def test_numbers_of_numpy_are_accepted(spark: SparkSession) -> None:
    vectors = vectors_of(8)
    features = table(spark, vectors)
    queries = table(spark, vectors[:2], prefix="q")
    k = np.int64(3)
    for asked, prefix, first in ((queries, "q", vectors[:2]), (features, "p", vectors)):
        assert found(nearest(asked, features, k)) == expected(first, vectors, 3, prefix)  # type: ignore[arg-type]
    groups = near_duplicates(features, np.float32(0.5))  # type: ignore[arg-type]
    assert groups_of(groups) == expected_groups(vectors, 0.5)


@pytest.mark.parametrize("key", ["group", "Group"])
def test_key_of_the_name_group_is_refused(spark: SparkSession, key: str) -> None:
    features = table(spark, vectors_of(3)).withColumnRenamed("path", key)
    with pytest.raises(OptionError, match=f"the key '{key}' is not valid: the result has its own"):
        near_duplicates(features, key="group")
    assert nearest(features, features, 1, key="group").count() == 3


@pytest.mark.parametrize("min_cosine", [0, -0.1, 1.01, float("nan"), "high"])
def test_min_cosine_out_of_range(spark: SparkSession, min_cosine: float) -> None:
    with pytest.raises(OptionError, match=f"min_cosine={min_cosine} is not valid"):
        near_duplicates(table(spark, vectors_of(3)), min_cosine)


def test_keys_that_name_no_row(spark: SparkSession) -> None:
    good = table(spark, vectors_of(3))
    twice = good.union(good.limit(1))
    with pytest.raises(OptionError, match="occurs 2 times: choose a unique key"):
        nearest(good, twice)
    with pytest.raises(OptionError, match="occurs 2 times"):
        near_duplicates(twice)
    unnamed = good.withColumn("path", F.lit(None).cast("string"))
    with pytest.raises(OptionError, match="3 of 3 rows have no key"):
        nearest(unnamed, good)
    other = good.withColumn("path", F.xxhash64("path"))
    with pytest.raises(OptionError, match="of type bigint and string: use the same type"):
        nearest(other, good)


@pytest.mark.parametrize("method", ["exact", "clustered"])
def test_vectors_of_other_lengths(spark: SparkSession, method: Any) -> None:
    if method == "clustered":
        pytest.importorskip("faiss")
    few, many = table(spark, [[1, 2]]), table(spark, vectors_of(9))
    for queries, features in ((few, many), (many, few)):
        with pytest.raises(Exception, match="vectors of . and of . features are not comparable"):
            nearest(queries, features, method=method).collect()
    with pytest.raises(Exception, match="vectors of . and of . features are not comparable"):
        near_duplicates(few.withColumn("path", F.lit("z")).union(many))


def test_features_of_other_models(spark: SparkSession) -> None:
    features = table(spark, vectors_of(3))

    def made_by(**options: Any) -> DataFrame:
        spec = ImageVectorizer(model=tiny, weights="random", engine="torch", **options).spec
        return features.withColumn("features", F.col("features").alias("", metadata=spec.metadata))

    with pytest.raises(FingerprintError, match="not comparable: .*normalize False and True"):
        nearest(made_by(), made_by(normalize=True))
    with pytest.raises(FingerprintError, match="'features' of queries has no provenance"):
        nearest(features, made_by())
    with pytest.raises(FingerprintError, match="'features' of features has no provenance"):
        nearest(made_by(), features)
    assert nearest(made_by(), made_by(), 1).count() == 3
    later = {"imagevec": {"fingerprint": "0", "imagevec": "9.1.0", "input_size": 224}}
    unknown = features.withColumn("features", F.col("features").alias("", metadata=later))
    with pytest.raises(FingerprintError, match="was written by imagevec 9.1.0"):
        nearest(unknown, unknown)


def clustered_vectors(count: int, seed: int = 0) -> np.ndarray:
    """Around some centres, as features of images are."""
    chance = np.random.default_rng(seed)
    centres = chance.standard_normal((30, 32))
    noise = 0.5 * chance.standard_normal((count, 32))
    return (centres[chance.integers(0, 30, count)] + noise).astype(np.float32)


def test_clustered_neighbours_are_true_ones(spark: SparkSession) -> None:
    pytest.importorskip("faiss")
    vectors = clustered_vectors(1500)
    queries, features = table(spark, vectors[:200], prefix="q"), table(spark, vectors)
    result = nearest(queries, features, 5, method="clustered", recall=0.9)
    pairs = found(result)
    true = expected(vectors[:200], vectors, 5)
    hits = sum(pair in pairs[query] for query, of_it in true.items() for pair in of_it)
    assert hits / 1000 == pytest.approx(result.schema["cosine"].metadata["recall"])
    assert 0.9 <= hits / 1000 < 1
    assert all(len(of_it) == 5 for of_it in pairs.values())
    again = nearest(queries, features.repartition(3), 5, method="clustered", recall=0.9)
    assert found(again) == pairs


def test_clustered_gives_k_neighbours_even_of_small_cells(spark: SparkSession) -> None:
    pytest.importorskip("faiss")
    vectors = clustered_vectors(40)
    features = table(spark, vectors)
    result = found(nearest(features, features, 40, method="clustered", recall=0.1))
    assert result == expected(vectors, vectors, 40, prefix="p")


def test_clustered_duplicates(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    vectors = clustered_vectors(600)
    chance = np.random.default_rng(1)
    vectors[300:] = vectors[:300] + 0.01 * chance.standard_normal((300, 32))
    for member_rows in (1 << 14, 3):  # a cell of many members is taken in parts
        monkeypatch.setattr("imagevec.search.cells._MEMBER_ROWS", member_rows)
        groups = groups_of(near_duplicates(table(spark, vectors), 0.99, method="clustered"))
        assert groups == expected_groups(vectors, 0.99)


@pytest.mark.parametrize("vectors", [[None, None], [[0.0, 0.0]] * 4, [[1.0, 2.0]] * 50])
def test_clustered_of_little(spark: SparkSession, vectors: Any) -> None:
    pytest.importorskip("faiss")
    features = table(spark, vectors)
    assert found(nearest(features, features, 3, method="clustered")) == expected(
        vectors, vectors, 3, prefix="p"
    )
    groups = groups_of(near_duplicates(features, method="clustered"))
    assert len(groups) == (1 if vectors[0] == [1.0, 2.0] else 0)


def test_clustered_mixed_queries_are_refused(spark: SparkSession) -> None:
    pytest.importorskip("faiss")
    queries = table(spark, [[1.0] * WIDTH, [1.0, 2.0]])
    with pytest.raises(FingerprintError, match=f"of 2 and of {WIDTH} features are not comparable"):
        nearest(queries, table(spark, vectors_of(9)), method="clustered")


@pytest.mark.parametrize("method", ["exact", "clustered"])
def test_concurrent_searches_do_not_share_files(spark: SparkSession, method: Any) -> None:
    """Threads that search different tables, and two that search the same one."""
    if method == "clustered":
        pytest.importorskip("faiss")
    tables = [vectors_of(40, seed) for seed in (0, 1, 2, 3, 0)]
    frames = [table(spark, vectors) for vectors in tables]

    def search(features: DataFrame) -> tuple[Any, Any]:
        neighbours = nearest(features, features, 3, method=method, recall=1)
        return found(neighbours), groups_of(near_duplicates(features, 0.6, method=method))

    with ThreadPoolExecutor(len(frames)) as pool:
        results = list(pool.map(search, frames))
    for vectors, (pairs, groups) in zip(tables, results, strict=True):
        assert pairs.keys() == {f"p{place:04d}" for place in range(40)}
        if method == "exact":
            assert pairs == expected(vectors, vectors, 3, prefix="p")
            assert groups == expected_groups(vectors, 0.6)
        for query, nearest_to_it in pairs.items():
            cosines = neighbours.nearest(vectors[[int(query[1:])]], vectors, 3)[1][0]
            assert nearest_to_it[0] == (query, 1) and nearest_to_it[1][1] <= cosines[1]


def test_search_leaves_no_folder(spark: SparkSession) -> None:
    """The result is computed after the call's own files are deleted."""
    roots = [Path(SparkFiles.getRootDirectory()), Path(tempfile.gettempdir())]
    before = {path for root in roots for path in root.glob("imagevec-search-*")}
    vectors = vectors_of(30)
    features = table(spark, vectors)
    result = nearest(features, features, 3)
    with pytest.raises(FingerprintError):
        near_duplicates(features.union(table(spark, [[1, 2]], prefix="x")))
    assert {path for root in roots for path in root.glob("imagevec-search-*")} == before
    assert found(result) == expected(vectors, vectors, 3, prefix="p")


def test_same_search_adds_no_file(spark: SparkSession) -> None:
    features = table(spark, vectors_of(30, seed=5))
    root = Path(SparkFiles.getRootDirectory())
    nearest(features, features, 3)
    before = sorted(root.iterdir())
    nearest(features, features, 4)
    assert sorted(root.iterdir()) == before


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Limits the size of files of this process, as a full disk would."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_explained(spark: SparkSession, file_limit: Callable[[int], None]) -> None:
    features = spark.range(1000).select(
        F.col("id").alias("path"), F.array_repeat(F.rand(0), 1024).alias("features")
    )
    root = SparkFiles.getRootDirectory()
    before = sorted(Path(root).iterdir())
    file_limit(2 << 20)
    with pytest.raises(ImageVecError) as raised:
        nearest(features, features)
    assert f"the disk of {root} is full: the search needs 8,192,000 bytes in" in str(raised.value)
    assert "set spark.local.dir to a folder on a larger disk" in str(raised.value)
    assert sorted(Path(root).iterdir()) == before


@pytest.mark.parametrize("method", ["exact", "clustered"])
@pytest.mark.parametrize("key", ["string", "binary"])
def test_large_arrow_types(spark: SparkSession, key: str, method: Any) -> None:
    if method == "clustered":
        pytest.importorskip("faiss")
    vectors = vectors_of(30, kinds=9)
    features = table(spark, vectors).withColumn("path", F.col("path").cast(key))
    queries = table(spark, vectors[:5], prefix="q").withColumn("path", F.col("path").cast(key))
    name = "spark.sql.execution.arrow.useLargeVarTypes"
    spark.conf.set(name, "true")
    try:
        for asked, first, prefix in ((queries, vectors[:5], "q"), (features, vectors, "p")):
            result = nearest(asked, features, 3, method=method, recall=1)
            as_text = result.selectExpr(
                "string(query) query", "string(neighbour) neighbour", "rank", "cosine"
            )
            assert found(as_text) == expected(first, vectors, 3, prefix)
        groups = near_duplicates(features, method=method)
        as_text = groups.selectExpr("string(path) path", "string(group) group")
        assert groups_of(as_text) == expected_groups(vectors, 0.95)
    finally:
        spark.conf.unset(name)


@pytest.mark.parametrize(
    ("queries", "vectors", "partitions", "k", "expected"),
    [
        (500, 200_000, 200, 10, True),
        (10_000, 1_000_000, 200, 10, True),
        (100_000, 100_000_000, 2_000, 10, True),  # the vectors would be 200 GB
        (500_000, 600_000, 200, 10, False),
        (500_000, 600_000, 2, 10, True),
        (600_000, 500_000, 2, 10, False),
        (5, 20, 1_000_000, 10, True),  # each partition returns at most its rows
    ],
)
def test_side_that_is_collected(
    queries: int, vectors: int, partitions: int, k: int, expected: bool
) -> None:
    assert _shuffles_little(queries, vectors, partitions, k) == expected


def test_count_of_keys_and_partitions(spark: SparkSession) -> None:
    assert count_keys(keyed(table(spark, vectors_of(40), partitions=7), "path", "features")) == (
        40,
        7,
    )
    none = table(spark, [None]).limit(0)
    assert count_keys(keyed(none, "path", "features"))[0] == 0


def test_result_does_not_depend_on_the_collected_side(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = vectors_of(40, kinds=20)
    queries, features = table(spark, vectors[:5], prefix="q"), table(spark, vectors)
    monkeypatch.setattr("imagevec.search.joins._SHUFFLED_PER_VECTOR", 0)
    result = nearest(queries, features, 3)
    assert found(result) == expected(vectors[:5], vectors, 3)
    assert "Window" not in result._jdf.queryExecution().toString()


def test_clustered_needs_its_extra(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    features = table(spark, vectors_of(3))
    with pytest.raises(MissingExtraError, match=r"pip install 'imagevec\[search\]'"):
        nearest(features, features, method="clustered")
