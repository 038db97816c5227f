"""Exact nearest neighbours by cosine, in blocks of a matrix product: never an N x N matrix.

This is the only implementation of the product and the selection. The Spark code calls it.

A vector that is zero or has a non-finite value has cosine 0 to every vector. Cosines are rounded to
multiples of 2**-20, about 1e-6, because a float32 product is not more accurate.
"""

from __future__ import annotations

import math
import numbers

import numpy as np
import numpy.typing as npt

from imagevec.errors import OptionError
from imagevec.options import check_positive

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_QUERY_ROWS = 1024  # per block of the product; larger blocks are not faster
_VECTOR_ROWS = 4096
_FEW_QUERIES = 2  # computed without BLAS, whose threads would wake for each block and then spin
_RESCORED_VALUES = 1 << 21  # float64 values at a time
_CROWDED = 64  # candidates per requested neighbour, beyond which ties are resolved early
_STEPS = 1 << 20  # in a cosine of 1

_AXES = 10  # more than two, so that the first two converge quickly
_ITERATIONS = 30


def nearest(queries: Vectors, vectors: Vectors, k: int) -> tuple[Indices, Vectors]:
    """Finds the ``k`` vectors with the highest cosines to each query, highest first.

    Ties go to the lower index. A query that is also among the vectors is its own neighbour.

    Args:
        queries: float32 ``(Q, D)``.
        vectors: float32 ``(N, D)``, N at least 1.
        k: The number of neighbours, at least 1. Values above N mean N.

    Returns:
        Indices into ``vectors``, int64 ``(Q, k)``, and cosines, float32 ``(Q, k)``.

    Raises:
        OptionError: ``k`` is below 1, there are no vectors, or the lengths of vectors differ.
    """
    if len(vectors) == 0:
        raise OptionError("there are no vectors to search")
    k = check_positive("k", k)
    if queries.shape[1] != vectors.shape[1]:
        raise OptionError(
            f"queries have {queries.shape[1]} features and vectors {vectors.shape[1]}: "
            "use the same model for both"
        )
    return nearest_units(unit_vectors(queries), unit_vectors(vectors), k)


def nearest_units(queries: Vectors, vectors: Vectors, k: int) -> tuple[Indices, Vectors]:
    """Like ``nearest``, for results of ``unit_vectors``, which may be mapped from a file."""
    k = min(k, len(vectors))
    indices = np.empty((len(queries), k), np.int64)
    cosines = np.empty((len(queries), k), np.float32)
    # A block must have room for its candidates, which are more than k.
    size = max(1, min(_QUERY_ROWS, _QUERY_ROWS * _VECTOR_ROWS // k))
    for begin in range(0, len(queries), size):
        rows = slice(begin, begin + size)
        indices[rows], steps = _nearest_of_block(queries[rows], vectors, k)
        cosines[rows] = steps / np.float64(_STEPS)
    return indices, cosines


def _nearest_of_block(queries: Vectors, vectors: Vectors, k: int) -> tuple[Indices, Indices]:
    """Returns indices and steps, both int64 ``(B, k)``.

    The float32 product proposes candidates: all vectors that may be among the k nearest, given its
    error. Their cosines are computed again in float64. The result therefore does not depend on how
    BLAS or the partitioning of the vectors divides the product into blocks.
    """
    error = product_error(queries.shape[1])
    floor = np.full(len(queries), -np.inf, np.float32)  # (B,): no cosine below is among the k
    row = np.empty(0, np.int64)  # per candidate: its query,
    index = np.empty(0, np.int64)  # its vector,
    about = np.empty(0, np.float32)  # and its approximate cosine
    space = np.empty(len(queries) * min(_VECTOR_ROWS, len(vectors)), np.float32)
    for begin in range(0, len(vectors), _VECTOR_ROWS):
        block = vectors[begin : begin + _VECTOR_ROWS]
        product = space[: len(queries) * len(block)].reshape(len(queries), len(block))
        if len(queries) <= _FEW_QUERIES:
            np.einsum("bd,vd->bv", queries, block, out=product)
        else:
            np.matmul(queries, block.T, out=product)
        if begin == 0 and k <= product.shape[1]:
            floor = np.partition(product, -k, axis=1)[:, -k] - 2 * error
        new = np.flatnonzero(product >= floor[:, None])
        if len(new) == 0:
            continue
        new_row, column = np.divmod(new, len(block))
        row = np.concatenate([row, new_row])
        index = np.concatenate([index, column + begin])
        about = np.concatenate([about, product[new_row, column]])
        if begin + _VECTOR_ROWS < k:
            continue
        order = np.lexsort((-about, row))
        row, index, about = row[order], index[order], about[order]
        # Each row now has at least k candidates: the first k in this order.
        floor = about[np.searchsorted(row, np.arange(len(queries))) + k - 1] - 2 * error
        kept = about >= floor[row]
        row, index, about = row[kept], index[kept], about[kept]
        if len(row) > _CROWDED * k * len(queries):  # many copies of one vector
            row, index, steps = _best(queries, vectors, row, index, k)
            about = (steps / _STEPS).astype(np.float32)
    row, index, steps = _best(queries, vectors, row, index, k)
    return index.reshape(len(queries), k), steps.reshape(len(queries), k)


def _best(
    queries: Vectors, vectors: Vectors, row: Indices, index: Indices, k: int
) -> tuple[Indices, Indices, Indices]:
    """Returns the ``k`` best candidates of each row, in order: rows, indices and steps."""
    steps = exact_steps(queries, vectors, row, index)
    order = np.lexsort((index, -steps, row))
    row, index, steps = row[order], index[order], steps[order]
    kept = rank_in_row(row) < k
    return row[kept], index[kept], steps[kept]


def rank_in_row(row: Indices) -> Indices:
    """Returns the rank of each candidate in its row, from 0; ``row`` must be sorted."""
    return np.arange(len(row)) - np.searchsorted(row, row)


def exact_steps(first: Vectors, second: Vectors, left: Indices, right: Indices) -> Indices:
    """Returns the cosine of ``first[left[i]]`` and ``second[right[i]]`` for each i, in steps."""
    steps = np.empty(len(left), np.int64)
    size = max(1, _RESCORED_VALUES // max(1, first.shape[1]))
    for begin in range(0, len(left), size):
        part = slice(begin, begin + size)
        one, other = first[left[part]].astype(np.float64), second[right[part]]
        cosines = np.einsum("nd,nd->n", one, other.astype(np.float64))
        steps[part] = np.rint(np.clip(cosines, -1, 1) * _STEPS)
    return steps


def product_error(features: int) -> float:
    """Returns the largest difference of a float32 product of unit vectors from the rounded cosine.

    It is the bound for a sum of D products in any order, D * 2**-24 (Higham 2002, section 3.1),
    with a margin for other rounding, plus half a step.
    """
    return (features + 8) * 2.0**-24 + 0.5 / _STEPS


def near_duplicates(vectors: Vectors, min_cosine: float) -> list[list[int]]:
    """Finds groups of vectors that are linked by cosines of at least ``min_cosine``.

    A group is a connected component: two of its members may be less similar, if others link them.

    Args:
        vectors: float32 ``(N, D)``.
        min_cosine: The threshold, above 0 and at most 1.

    Returns:
        The indices of each group of two or more, ascending. Groups are sorted by first index.

    Raises:
        OptionError: ``min_cosine`` is out of range.
    """
    min_cosine = check_min_cosine(min_cosine)
    units = unit_vectors(vectors)
    root = np.arange(len(units))  # (N,): the lowest index known to be linked to each
    link_near(root, units, slice(0, len(units)), slice(0, len(units)), min_cosine)
    order = np.argsort(root, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(root[order])) + 1)
    return [group.tolist() for group in groups if len(group) > 1]


def check_min_cosine(min_cosine: float) -> float:
    """Returns it as a float, or raises ``OptionError`` if it is out of range."""
    if not isinstance(min_cosine, numbers.Real) or not 0 < min_cosine <= 1:
        raise OptionError(
            f"min_cosine={min_cosine} is not valid: use a number above 0 and at most 1"
        )
    return float(min_cosine)


def link_near(
    root: Indices, units: Vectors, below: slice, beside: slice, min_cosine: float
) -> None:
    """Links near vectors of two row ranges in ``root``. The first range must not begin later."""
    least = math.ceil(min_cosine * _STEPS)  # cosines that round to it are near
    error = product_error(units.shape[1])
    threshold = np.float32(least / _STEPS)
    size = _VECTOR_ROWS
    for top in range(below.start, below.stop, size):
        for left in range(max(beside.start, top if below == beside else 0), beside.stop, size):
            rows = slice(top, min(top + size, below.stop))
            columns = slice(left, min(left + size, beside.stop))
            product = units[rows] @ units[columns].T  # (B, B)
            near = product >= threshold - error
            near &= root[rows, None] != root[columns]  # of many copies, few pairs remain
            row, column = np.nonzero(near)
            if len(row) == 0:
                continue
            unsure = product[row, column] < threshold + error
            row, column = row + top, column + left
            _link(root, row[~unsure], column[~unsure])
            row, column = row[unsure], column[unsure]
            apart = root[row] != root[column]
            row, column = row[apart], column[apart]
            are_near = exact_steps(units, units, row, column) >= least
            _link(root, row[are_near], column[are_near])


def _link(root: Indices, first: Indices, second: Indices) -> None:
    """Merges the components of ``first[i]`` and ``second[i]`` in ``root``, for each i."""
    while True:
        first, second = root[first], root[second]
        apart = first != second
        if not apart.any():
            return
        first, second = first[apart], second[apart]
        np.minimum.at(root, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(root, above := root[root]):
            root[:] = above


def map_2d(vectors: Vectors) -> Vectors:
    """Maps vectors to a plane, similar ones close together: the first two principal components.

    The vectors are scaled to length 1 first, so that the plane reflects cosines. The result is
    deterministic: the largest entry of each axis is positive.

    Args:
        vectors: float32 ``(N, D)``, both at least 1.

    Returns:
        float32 ``(N, 2)``. Each column ranges from 0 to 1, or is 0.5 if the vectors do not differ.
    """
    centred = unit_vectors(vectors)  # (N, D)
    centred -= centred.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4): no D x D matrix either.
    features = centred.shape[1]
    basis = np.random.default_rng(0).standard_normal((features, min(_AXES, features)))
    for _ in range(_ITERATIONS):
        basis, _upper = np.linalg.qr(centred.T @ (centred @ basis.astype(np.float32)))
    scores = (centred @ basis).astype(np.float64)  # (N, A)
    _, directions = np.linalg.eigh(scores.T @ scores)  # ascending
    axes = basis @ directions[:, ::-1][:, :2]  # (D, 2), or (1, 1)
    largest = np.abs(axes).argmax(axis=0)
    axes *= np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1, 1)
    places = centred @ axes
    low, extent = places.min(axis=0), np.ptp(places, axis=0)
    differs = extent > 1e-5  # a smaller extent is rounding
    plane = np.full((len(vectors), 2), 0.5, np.float32)
    plane[:, : len(extent)][:, differs] = ((places - low)[:, differs]) / extent[differs]
    return plane


def unit_vectors(vectors: Vectors) -> Vectors:
    """Returns a float32 copy ``(N, D)``, each vector of length 1, or zero if without direction."""
    with np.errstate(invalid="ignore", over="ignore"):
        units = np.array(vectors, np.float32)
        largest = np.maximum(units.max(axis=1, initial=0), -units.min(axis=1, initial=0))  # (N,)
    has_direction = np.isfinite(largest) & (largest > 0)
    units[~has_direction] = 0
    units /= np.where(has_direction, largest, 1)[:, None]  # else squares overflow or underflow
    lengths = np.sqrt(np.einsum("nd,nd->n", units, units, dtype=np.float64))
    units /= np.where(has_direction, lengths, 1).astype(np.float32)[:, None]
    return units
