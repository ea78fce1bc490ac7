"""Exact squared L2: distances to given rows of an array of keys, and its nearest rows.

FAISS rounds distances differently for every batch and array size. What is computed here pair by pair
depends on the pair alone, so that ties stay ties and no answer depends on batches or shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

from retro_ray.index.merge import Candidates, merge_candidates, pack_distances, unpack_columns

FAISS: Any = faiss
"""The same library, for what its type stubs leave out."""
_MARGIN = 8
"""Rows fetched beyond those asked for, so that ties and rounding seldom need a second search."""
_BATCH = 20
"""Queries from which on FAISS multiplies matrices."""
_FEW_KEYS = 1024
"""To choose among so few, FAISS takes longer than to multiply them; NumPy chooses faster. With 512 a query takes 6.7
microseconds in place of 15.7, with 2,048 no less."""


def squared_distances(queries: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared L2 distances float32 [Q, C] of queries [Q, D] to `rows` int64 [Q, C] of keys [n, D]; infinity at -1.

    All arrays C-contiguous; keys may be memory-mapped, only the rows are read.
    """
    distances = np.empty(rows.shape, np.float32)
    if distances.size:
        pointer = faiss.swig_ptr
        FAISS.fvec_L2sqr_by_idx(
            pointer(distances), pointer(queries), pointer(keys), pointer(rows), keys.shape[1], *rows.shape
        )
    return distances


class ExactKeys:
    """Exhaustive search of keys, float32 [n, D], in memory or memory-mapped; nothing is copied."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        self._max_square = max((_max_square(block) for block in _blocks(keys)), default=0.0)

    def candidates(self, queries: np.ndarray, num_rows: int, selector: faiss.IDSelector | None = None) -> Candidates:
        """About the `num_rows` nearest rows of each query, with what can be said of the others.

        Args:
            queries: float32 [Q, D].
            num_rows: how many.
            selector: the rows to choose from; None: all.
        """
        num_rows = min(num_rows, len(self._keys))
        if not num_rows or not len(queries):
            nothing = np.empty((len(queries), num_rows), np.float32)
            return Candidates(nothing, nothing, nothing.astype(np.int64), np.full(len(queries), np.inf, np.float32))
        queries = np.ascontiguousarray(queries, np.float32)
        if selector is None and len(queries) >= _BATCH and num_rows < len(self._keys) <= _FEW_KEYS:
            farthest, rows = self._choose(queries, num_rows)
        else:
            farthest, rows = self._search(queries, num_rows, selector)
        distances = squared_distances(queries, self._keys, rows)
        seen_all = (rows[:, -1] < 0) | (num_rows == len(self._keys))
        hidden_from = np.where(seen_all, np.inf, farthest - self._rounding(queries))
        return Candidates(distances, distances, rows, hidden_from.astype(np.float32))

    def _search(
        self, queries: np.ndarray, num_rows: int, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest rows as FAISS finds them, int64 [Q, C], and how far the last one is to it, float32 [Q]."""
        rough, rows = np.empty((len(queries), num_rows), np.float32), np.full((len(queries), num_rows), -1, np.int64)
        pointer = faiss.swig_ptr
        # With more threads than queries FAISS shares out the keys, and takes four times as long as one thread does.
        with threads_at_most(len(queries)):
            faiss.knn_L2sqr(
                pointer(queries),
                pointer(self._keys),
                self._keys.shape[1],
                len(queries),
                len(self._keys),
                num_rows,
                pointer(rough),
                pointer(rows),
                None,
                selector,
            )
        return rough[:, -1], rows

    def _choose(self, queries: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_search`, from the distances to all keys."""
        rough, pointer = np.empty((len(queries), len(self._keys)), np.float32), faiss.swig_ptr
        FAISS.pairwise_L2sqr(
            self._keys.shape[1], len(queries), pointer(queries), len(self._keys), pointer(self._keys), pointer(rough)
        )
        packed = pack_distances(rough.clip(min=0))  # rounding can make them negative
        packed.partition(num_rows - 1, axis=1)
        rows = unpack_columns(packed[:, :num_rows])
        return np.take_along_axis(rough, rows[:, -1:], 1)[:, 0], rows

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest rows, ties by row: distances float32 [Q, k], rows int64 [Q, k]; inf and -1 where missing."""
        queries = np.ascontiguousarray(queries, np.float32)
        distances, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        asked, num_rows = np.arange(len(queries)), k + _MARGIN
        while len(asked):
            found = merge_candidates([self.candidates(queries[asked], num_rows)], k, k)
            distances[asked], rows[asked] = found.distances, found.ids
            asked, num_rows = asked[found.unfinished], 4 * num_rows
        return distances, rows

    def _rounding(self, queries: np.ndarray) -> np.ndarray:
        """How far off FAISS's distances of each query can be, [Q].

        It batches them as |q|^2 + |x|^2 - 2 q x in float32: what is lost there grows with the lengths
        of the vectors, not with their distance, and with the root of their dimensions.
        """
        squares = np.einsum("qd,qd->q", queries, queries) + self._max_square
        return 2 * math.sqrt(queries.shape[1]) * np.finfo(np.float32).eps * squares


@contextmanager
def unbatched_distances() -> Iterator[None]:
    """FAISS computes distances pair by pair meanwhile: slower, but the same whatever the batch."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1 << 30
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


@contextmanager
def threads_at_most(limit: int) -> Iterator[None]:
    """What this thread asks of FAISS meanwhile is done by no more; by it alone, if by one. (Others may be told
    otherwise at the same time.)
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(min(limit, before))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _blocks(keys: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(keys), 1 << 14):
        yield keys[start : start + (1 << 14)]


def _max_square(keys: np.ndarray) -> float:
    """Squared length of the longest key."""
    return float(np.einsum("nd,nd->n", keys, keys).max(initial=0.0))
