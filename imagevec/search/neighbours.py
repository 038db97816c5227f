"""Exact nearest neighbours by cosine, in blocks of a matrix product: never an N x N matrix.

A vector that is zero, or that has a value which is not finite, has cosine 0 to every vector.
Cosines are rounded to multiples of 2**-20, about 1e-6: a float32 product is good for no more.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from imagevec.errors import OptionError
from imagevec.options import check_positive

Vectors = npt.NDArray[np.float32]

_BLOCK_CELLS = 1 << 23  # cosines that are held at a time, 12 bytes each
_STEPS = 1 << 20  # of a cosine of 1
_INDEX_BITS = 32

_AXES = 10  # more than two, so that the first two converge soon
_ITERATIONS = 30


def nearest(queries: Vectors, vectors: Vectors, k: int) -> tuple[npt.NDArray[np.int64], Vectors]:
    """The ``k`` vectors with the highest cosines to each query, highest first.

    Ties go to the lower index. A query that is itself among the vectors is its own neighbour.

    Args:
        queries: float32 ``(Q, D)``.
        vectors: float32 ``(N, D)``, N at least 1.
        k: At least 1; N where it is larger.

    Returns:
        Indices into ``vectors``, int64 ``(Q, k)``, and cosines, float32 ``(Q, k)``.

    Raises:
        OptionError: ``k`` is below 1, there are no vectors, or the lengths of vectors differ.
    """
    if len(vectors) == 0:
        raise OptionError("there are no vectors to search")
    check_positive("k", k)
    if queries.shape[1] != vectors.shape[1]:
        raise OptionError(
            f"queries have {queries.shape[1]} features and vectors {vectors.shape[1]}: "
            "use the same model for both"
        )
    k = min(k, len(vectors))
    others = _unit(vectors).T  # (D, N)
    keys = np.empty((len(queries), k), np.int64)
    size = max(1, _BLOCK_CELLS // len(vectors))
    for begin in range(0, len(queries), size):
        rows = slice(begin, begin + size)
        block = _keys(_unit(queries[rows]) @ others)  # (B, N)
        block.partition(k - 1, axis=1)
        keys[rows] = np.sort(block[:, :k], axis=1)
    steps = keys >> _INDEX_BITS
    return keys & ((1 << _INDEX_BITS) - 1), (1 - steps / _STEPS).astype(np.float32)


def _keys(cosines: Vectors) -> npt.NDArray[np.int64]:
    """Integers that sort by cosine, highest first, then by column: steps below 1, and column."""
    steps = np.rint((1 - np.clip(cosines, -1, 1)) * _STEPS).astype(np.int64)  # (B, N)
    steps <<= _INDEX_BITS
    steps |= np.arange(cosines.shape[1])
    return steps


def near_duplicates(vectors: Vectors, min_cosine: float) -> list[list[int]]:
    """Groups of vectors that are linked by cosines of at least ``min_cosine``.

    A group is a connected component: two of its members may be less alike, with others between.

    Args:
        vectors: float32 ``(N, D)``.
        min_cosine: Above 0, at most 1.

    Returns:
        The indices of each group of two or more, ascending; groups by their first index.

    Raises:
        OptionError: ``min_cosine`` is out of range.
    """
    if not 0 < min_cosine <= 1:
        raise OptionError(
            f"min_cosine={min_cosine} is not valid: use a number above 0 and at most 1"
        )
    unit = _unit(vectors)
    threshold = (math.ceil(min_cosine * _STEPS) - 0.5) / _STEPS  # what is rounded to it counts
    root = np.arange(len(unit))  # (N,): the lowest index that each is known to be linked to
    size = max(1, math.isqrt(_BLOCK_CELLS))
    for top in range(0, len(unit), size):
        for left in range(top, len(unit), size):
            below, beside = slice(top, top + size), slice(left, left + size)
            near = unit[below] @ unit[beside].T >= threshold  # (B, B)
            near &= root[below, None] != root[beside]  # few are left, of many copies
            rows, columns = np.nonzero(near)
            _link(root, rows + top, columns + left)
    order = np.argsort(root, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(root[order])) + 1)
    return [group.tolist() for group in groups if len(group) > 1]


def _link(
    root: npt.NDArray[np.int64], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> None:
    """Makes the components of ``first[i]`` and ``second[i]`` one, for every i, in ``root``."""
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
    """Places on a plane, alike vectors close together: the first two principal components.

    The vectors are brought to length 1 first, so that the plane shows cosines. The same vectors
    have the same places every time: an axis points to where its largest entry is positive.

    Args:
        vectors: float32 ``(N, D)``, both at least 1.

    Returns:
        float32 ``(N, 2)``. Each column goes from 0 to 1, or is 0.5 where the vectors do not differ.
    """
    centred = _unit(vectors)  # (N, D)
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
    differs = extent > 1e-5  # less is rounding
    plane = np.full((len(vectors), 2), 0.5, np.float32)
    plane[:, : len(extent)][:, differs] = ((places - low)[:, differs]) / extent[differs]
    return plane


def _unit(vectors: Vectors) -> Vectors:
    """A float32 copy ``(N, D)``, each vector at length 1, or zero where it has no direction."""
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.array(vectors, np.float32)
        largest = np.maximum(unit.max(axis=1, initial=0), -unit.min(axis=1, initial=0))  # (N,)
    has_direction = np.isfinite(largest) & (largest > 0)
    unit[~has_direction] = 0
    unit /= np.where(has_direction, largest, 1)[:, None]  # else squares overflow, or vanish
    lengths = np.sqrt(np.einsum("nd,nd->n", unit, unit))
    unit /= np.where(has_direction, lengths, 1)[:, None]
    return unit
