from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from imagevec import OptionError
from imagevec.search import neighbours
from imagevec.search.neighbours import map_2d, near_duplicates, nearest

ROUNDING = 2e-6


def random_vectors(count: int, features: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, features)).astype(np.float32)


def all_cosines(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """float64 ``(Q, N)``, 0 where a vector has no direction."""

    def unit(rows):
        rows = np.asarray(rows, np.float64)
        good = np.isfinite(rows).all(1) & (rows != 0).any(1)
        rows = np.where(good[:, None], rows, 0)
        return rows / np.where(good, np.linalg.norm(rows, axis=1), 1)[:, None]

    return unit(queries) @ unit(vectors).T


def blocks_of(rows: int, columns: int, crowded: int = 64) -> AbstractContextManager[object]:
    return mock.patch.multiple(neighbours, _QUERY_ROWS=rows, _VECTOR_ROWS=columns, _CROWDED=crowded)


HUGE, SMALL = float(np.float32(1e30)), float(np.float32(1e-30))  # as float32 has them
ANY_VECTORS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 25), st.just(4)),
    elements=st.sampled_from([0, 0, 1, -1, 2, 0.5, HUGE, SMALL, np.nan, np.inf, -np.inf]),
)


BLOCKS = st.sampled_from([(1, 1), (2, 3), (3, 2, 1), (10, 7, 1), (512, 2048)])


@given(ANY_VECTORS, ANY_VECTORS, st.integers(1, 30), BLOCKS)
def test_nearest_is_what_brute_force_finds(queries, vectors, k, blocks):
    with blocks_of(*blocks):
        indices, cosines = nearest(queries, vectors, k)
    k = min(k, len(vectors))
    assert indices.shape == cosines.shape == (len(queries), k)
    assert indices.dtype == np.int64 and cosines.dtype == np.float32
    expected = all_cosines(queries, vectors)
    found = np.take_along_axis(expected, indices, axis=1)
    np.testing.assert_allclose(cosines, found, atol=ROUNDING)
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :k], atol=ROUNDING)
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@given(st.integers(0, 99), st.integers(1, 60), BLOCKS)
def test_no_bit_depends_on_the_blocks(seed, k, blocks):
    """Whatever BLAS computes in blocks of one shape or another; many vectors are copies."""
    chance = np.random.default_rng(seed)
    vectors = random_vectors(20, 37, seed)[chance.integers(0, 20, 60)]
    vectors[::7] *= 3
    queries = vectors[chance.permutation(60)[:25]]
    expected = nearest(queries, vectors, k)
    with blocks_of(*blocks):
        found = nearest(queries, vectors, k)
    one_by_one = [nearest(query[None], vectors, k) for query in queries]
    for place, array in enumerate(expected):
        np.testing.assert_array_equal(found[place], array)
        np.testing.assert_array_equal(np.concatenate([one[place] for one in one_by_one]), array)


@pytest.mark.parametrize("blocks", [(1, 1), (7, 50), (512, 2048)])
def test_nearest_of_many_features(blocks):
    queries, vectors = random_vectors(30, 300, seed=1), random_vectors(200, 300, seed=2)
    with blocks_of(*blocks):
        indices, cosines = nearest(queries, vectors, 10)
    expected = all_cosines(queries, vectors)
    np.testing.assert_array_equal(indices, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :10], atol=ROUNDING)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40))
def test_ties_go_to_the_lower_index(corners, k):
    directions = np.array([[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [-1, -1, -1, -1]])
    vectors = directions[corners].astype(np.float32)
    indices, cosines = nearest(directions[:1].astype(np.float32), vectors, k)
    order = sorted(range(len(corners)), key=lambda index: (corners[index], index))
    assert indices[0].tolist() == order[:k]
    cosine_of = [1, 0.5, 0, -1]
    assert cosines[0].tolist() == [cosine_of[corners[index]] for index in order[:k]]


def test_scale_is_of_no_effect():
    vectors = random_vectors(20)
    scales = np.logspace(-35, 35, 20, dtype=np.float32)[:, None]
    near, cosines = nearest(vectors, vectors, 5)
    near_scaled, cosines_scaled = nearest(vectors * scales, vectors * scales[::-1], 5)
    np.testing.assert_array_equal(near, near_scaled)
    np.testing.assert_allclose(cosines, cosines_scaled, atol=ROUNDING)


def test_vectors_without_a_direction_are_near_nothing():
    vectors = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [3, 4]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        indices, cosines = nearest(vectors, vectors, 4)
    assert cosines[:3].tolist() == [[0] * 4] * 3
    assert indices[3].tolist() == [3, 0, 1, 2]
    assert cosines[3].tolist() == [1, 0, 0, 0]


def test_arguments_are_left_as_they_are():
    vectors = random_vectors(5)
    before = vectors.copy()
    nearest(vectors, vectors, 2)
    near_duplicates(vectors, 0.5)
    map_2d(vectors)
    np.testing.assert_array_equal(vectors, before)


@pytest.mark.parametrize(
    ("queries", "vectors", "k", "message"),
    [
        (random_vectors(1), random_vectors(3), 0, "at least 1"),
        (random_vectors(1), random_vectors(0), 1, "no vectors"),
        (random_vectors(1, 8), random_vectors(3, 16), 1, "8 features and vectors 16"),
    ],
)
def test_what_cannot_be_searched_is_an_option_error(queries, vectors, k, message):
    with pytest.raises(OptionError, match=message):
        nearest(queries, vectors, k)


def groups_by_search(cosines: np.ndarray, min_cosine: float) -> list[list[int]]:
    """Connected components, one at a time."""
    left, groups = set(range(len(cosines))), []
    while left:
        group, reached = set(), {min(left)}
        while reached:
            group |= reached
            linked = (cosines[sorted(reached)] >= min_cosine).any(axis=0)
            reached = set(np.flatnonzero(linked).tolist()) - group
        left -= group
        groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


@given(st.integers(0, 60), st.integers(0, 99), BLOCKS)
def test_near_duplicates_are_connected_components(count, seed, blocks):
    vectors = random_vectors(count, features=3, seed=seed)
    with blocks_of(*blocks):
        groups = near_duplicates(vectors, 0.97)
    assert groups == groups_by_search(all_cosines(vectors, vectors), 0.97)


def test_a_chain_is_one_group():
    angles = np.radians(np.arange(0, 180, 5))  # neighbours are 5 degrees apart
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(len(chain))
    with blocks_of(5, 5):
        assert near_duplicates(chain[shuffled], 0.995) == [list(range(len(chain)))]
        assert near_duplicates(chain[shuffled], 0.997) == []


def test_copies_are_duplicates_even_at_a_cosine_of_1():
    vectors = random_vectors(50, 300)
    copies = np.concatenate([vectors, vectors * 3, vectors[:10]])
    groups = near_duplicates(copies, 1.0)
    assert groups == [
        [index, 50 + index, 100 + index] if index < 10 else [index, 50 + index]
        for index in range(50)
    ]


def test_vectors_without_a_direction_have_no_duplicates():
    vectors = np.array([[0, 0], [0, 0], [np.nan, 1], [np.nan, 1], [1, 1], [1, 1]], np.float32)
    assert near_duplicates(vectors, 1e-9) == [[4, 5]]


@pytest.mark.parametrize("min_cosine", [0, -0.5, 1.01, float("nan")])
def test_a_min_cosine_that_makes_no_sense_is_an_option_error(min_cosine):
    with pytest.raises(OptionError, match="above 0 and at most 1"):
        near_duplicates(random_vectors(2), min_cosine)


def principal_components(vectors: np.ndarray) -> np.ndarray:
    """``(N, 2)`` in float64, each column 0 to 1."""
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1)[:, None]
    centred = unit - unit.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    places = centred @ axes[:2].T
    return (places - places.min(0)) / np.ptp(places, axis=0)


def test_the_map_shows_the_principal_components():
    spread = np.linspace(3, 0.1, 40)
    vectors = (random_vectors(300, 40) * spread).astype(np.float32)
    places, expected = map_2d(vectors), principal_components(vectors)
    assert places.shape == (300, 2)
    assert places.dtype == np.float32
    for axis in range(2):
        same, mirrored = places[:, axis] - expected[:, axis], places[:, axis] + expected[:, axis]
        assert min(np.abs(same).max(), np.abs(mirrored - 1).max()) < 1e-3


def test_the_map_parts_what_is_apart():
    centres = random_vectors(3, 64, seed=5) * 10
    of = np.repeat(np.arange(3), 20)
    places = map_2d(centres[of] + random_vectors(60, 64))
    middles = np.stack([places[of == group].mean(0) for group in range(3)])
    distances = np.linalg.norm(places[:, None] - middles, axis=2)  # (N, 3)
    np.testing.assert_array_equal(distances.argmin(1), of)


def test_the_map_is_the_same_each_time_and_in_any_order():
    vectors = (random_vectors(100, 12) * np.linspace(3, 0.1, 12)).astype(np.float32)
    np.testing.assert_array_equal(map_2d(vectors), map_2d(vectors))
    order = np.random.default_rng(1).permutation(100)
    np.testing.assert_allclose(map_2d(vectors[order]), map_2d(vectors)[order], atol=1e-3)


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 14)),
        elements=st.sampled_from([0, 1, -1, 3, HUGE, np.nan, np.inf]),
    )
)
def test_any_vectors_have_places(vectors):
    places = map_2d(vectors)
    assert places.shape == (len(vectors), 2)
    assert ((places >= 0) & (places <= 1)).all()
    for column in places.T:
        assert (column == 0.5).all() or (column.min(), column.max()) == (0, 1)


def test_equal_vectors_are_in_the_middle():
    vectors = np.repeat(random_vectors(1, 300), 50, axis=0)
    assert (map_2d(vectors) == 0.5).all()
