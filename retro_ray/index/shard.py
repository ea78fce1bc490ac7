"""Searching one FAISS shard, with the rules of retrieval that a bare index does not keep."""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np

from retro_ray.database.format import IndexSpec
from retro_ray.index.merge import nearest, pad_columns

_MARGIN = 8
"""Candidates fetched beyond k, so that ties and a few excluded rows seldom need a second search."""
_WIDENINGS = (1, 4, 16)
"""Times as many candidates in each further search of a batch."""
_NONE_EXCLUDED = (-1, -1)


class IndexShard:
    """One index, row i of which is chunk i of its shard.

    Distances are squared L2. An exact index returns exactly the k smallest (distance, row) pairs:
    FAISS rounds batched distances differently for every batch and shard size, so candidates are
    scored again from the keys themselves, and ties at the end of the list are followed until they
    are complete.
    """

    def __init__(self, index: faiss.Index, spec: IndexSpec) -> None:
        self._index = index
        self._spec = spec
        self.num_rows: int = index.ntotal
        self._keys = _vectors(index) if spec.is_exact else None
        self._max_square = 0.0 if self._keys is None else _max_square(self._keys)
        self._num_lists: int = 0 if spec.is_exact else faiss.extract_index_ivf(index).nlist

    def search(
        self, queries: np.ndarray, k: int, excluded_rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest rows of each query.

        Args:
            queries: float32 [Q, D].
            k: how many.
            excluded_rows: int64 [Q, 2], first and last row to pass over ((-1, -1): none). Others are
                found in their place, until there are k or the shard is exhausted.

        Returns:
            distances float32 [Q, k] (inf where missing) and rows int64 [Q, k] (-1 where missing).
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if excluded_rows is None:
            excluded_rows = np.full((len(queries), 2), _NONE_EXCLUDED, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        if not len(queries) or not self.num_rows or not k:
            return distances, rows
        # All at once, as batches are cheap per query; then, wider, those that ties or exclusions leave open; and
        # what few remain per excluded range, which FAISS then passes over by itself.
        unfinished = np.arange(len(queries))
        for widening in _WIDENINGS:
            distances[unfinished], rows[unfinished], complete = self._search_once(
                queries[unfinished], k, widening * (k + _MARGIN), self._spec.nprobe, excluded_rows[unfinished]
            )
            unfinished = unfinished[~complete]
            if not len(unfinished):
                return distances, rows
        ranges, group_of = np.unique(excluded_rows[unfinished], axis=0, return_inverse=True)
        for group, (first, last) in enumerate(ranges):
            members = unfinished[group_of.reshape(-1) == group]
            distances[members], rows[members] = self._search_until_complete(queries[members], k, first, last)
        return distances, rows

    def _search_until_complete(
        self, queries: np.ndarray, k: int, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search rows outside first..last; more candidates and more lists until nothing can change."""
        selector = None if first < 0 else faiss.IDSelectorNot(faiss.IDSelectorRange(int(first), int(last) + 1))
        distances = np.full((len(queries), k), np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        excluded = np.broadcast_to(np.array([first, last], np.int64), (len(queries), 2))
        unfinished = np.arange(len(queries))
        num_candidates, nprobe = k + _MARGIN, self._spec.nprobe
        while len(unfinished):
            distances[unfinished], rows[unfinished], complete = self._search_once(
                queries[unfinished], k, num_candidates, nprobe, excluded[unfinished], selector
            )
            if num_candidates >= self.num_rows and nprobe >= self._num_lists:
                break
            unfinished = unfinished[~complete]
            num_candidates, nprobe = 4 * num_candidates, min(self._num_lists, 4 * nprobe)
        return distances, rows

    def _search_once(
        self,
        queries: np.ndarray,
        k: int,
        num_candidates: int,
        nprobe: int,
        excluded_rows: np.ndarray,
        selector: faiss.IDSelector | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One search: distances and rows [Q, k], and which queries no wider search would change [Q]."""
        num_candidates = min(self.num_rows, num_candidates)
        parameters = self._parameters(nprobe, k, num_candidates, selector)
        coarse, candidates = self._index.search(queries, num_candidates, params=parameters)
        excluded = (candidates >= excluded_rows[:, :1]) & (candidates <= excluded_rows[:, 1:])
        allowed = np.where(excluded, -1, candidates)
        scores = coarse if self._keys is None else _exact_distances(queries, self._keys, candidates)
        order = nearest(scores, allowed, k)
        rows = pad_columns(np.take_along_axis(allowed, order, 1), k, -1)
        distances = pad_columns(np.take_along_axis(scores, order, 1), k, np.inf)
        distances = np.where(rows < 0, np.inf, distances)
        num_allowed = self.num_rows - _num_rows_in(excluded_rows, self.num_rows)
        complete = (rows >= 0).sum(1) >= np.minimum(k, num_allowed)
        if self._keys is not None and num_candidates < self.num_rows:
            # Beyond rounding, the farthest candidate must be farther than the last neighbour kept: else a row
            # at the same distance, with a smaller number, may be outside the list. (-1: all rows were seen.)
            farther = coarse[:, -1] > distances[:, -1] + self._rounding(queries)
            complete &= farther | (candidates[:, -1] < 0) | (num_allowed < k)
        return distances, rows, complete

    def _rounding(self, queries: np.ndarray) -> np.ndarray:
        """How far off FAISS's distances of each query can be, [Q].

        It batches them as |q|^2 + |x|^2 - 2 q x in float32: what is lost there grows with the lengths
        of the vectors, not with their distance, and with the root of their dimensions.
        """
        squares = np.einsum("qd,qd->q", queries, queries) + self._max_square
        return 2 * math.sqrt(queries.shape[1]) * np.finfo(np.float32).eps * squares

    def _parameters(
        self, nprobe: int, k: int, num_candidates: int, selector: faiss.IDSelector | None
    ) -> faiss.SearchParameters:
        if self._spec.is_exact:
            return _with(faiss.SearchParameters, sel=selector)
        # The refine stage scores refine_factor x k candidates, however many of them are returned.
        k_factor = max(1.0, self._spec.refine_factor * k / num_candidates)
        inverted_lists = _with(faiss.SearchParametersIVF, nprobe=nprobe, sel=selector)
        return _with(faiss.IndexRefineSearchParameters, k_factor=k_factor, base_index_params=inverted_lists)


def _with(parameters: Any, **values: Any) -> faiss.SearchParameters:
    """Search parameters by name: FAISS adds the keyword arguments at run time, where no type checker sees them."""
    return parameters(**values)


def _vectors(index: faiss.Index) -> np.ndarray:
    """float32 [ntotal, d]: a view of a flat index's vectors."""
    flat: Any = faiss.downcast_index(index)
    if not flat.ntotal:
        return np.empty((0, flat.d), np.float32)
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


def _max_square(keys: np.ndarray) -> float:
    """Squared length of the longest key."""
    return float(np.einsum("nd,nd->n", keys, keys).max(initial=0.0))


def _exact_distances(queries: np.ndarray, keys: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Squared L2 [Q, C] summed in float64 and rounded once: the same whatever the batch and the shard."""
    scores = np.empty(candidates.shape, np.float32)
    for query, rows in enumerate(candidates):
        difference = keys[rows] - queries[query]
        scores[query] = np.einsum("cd,cd->c", difference, difference, dtype=np.float64)
    return scores


def _num_rows_in(ranges: np.ndarray, num_rows: int) -> np.ndarray:
    """int64 [Q]: how many of the shard's rows each range (first, last) covers."""
    first, last = np.maximum(ranges[:, 0], 0), np.minimum(ranges[:, 1], num_rows - 1)
    return np.where(ranges[:, 1] < 0, 0, np.maximum(last - first + 1, 0))
