"""What is done once per query, before any shard is asked: transformation and the lists to visit.

FAISS's own matrix products round differently for every batch size, and near ties then fall otherwise.
Here everything depends on the query alone, so that batches can be cut anyhow, and shards agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from retro_ray.index.exact import FAISS, ExactKeys
from retro_ray.index.spec import IndexSpec

_ROWS_PER_PRODUCT = 512


@dataclass(frozen=True)
class PreparedQueries:
    """Q queries as shards want them."""

    keys: np.ndarray
    """float32 [Q, D]: the queries themselves."""
    transformed: np.ndarray
    """float32 [Q, D']: as the codes see them; [Q, 0] for an exact index."""
    lists: np.ndarray
    """int64 [Q, nprobe]: inverted lists to visit, nearest first; [Q, 0] for an exact index."""
    list_distances: np.ndarray
    """float32 [Q, nprobe]: squared L2 to the lists' centroids."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice | np.ndarray) -> PreparedQueries:
        return PreparedQueries(self.keys[rows], self.transformed[rows], self.lists[rows], self.list_distances[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[PreparedQueries]) -> PreparedQueries:
        """Several as one batch; all with the same nprobe."""
        names = ("keys", "transformed", "lists", "list_distances")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class QueryEncoder:
    """Prepares queries for all segments whose indexes were made from one codec.

    Args:
        spec: of the database's manifest.
        codec: the trained index, empty or filled; None for an exact index.
    """

    def __init__(self, spec: IndexSpec, codec: faiss.Index | None) -> None:
        self._codec = codec
        self._nprobe = spec.nprobe
        self._centroids: ExactKeys | None = None
        self.num_lists = 0
        if codec is not None:
            lists: Any = faiss.extract_index_ivf(codec)
            self.num_lists = lists.nlist
            self._centroids = ExactKeys(lists.quantizer.reconstruct_n(0, lists.nlist))

    def prepare(self, queries: np.ndarray, nprobe: int | None = None) -> PreparedQueries:
        """Queries float32 [Q, D], to visit the `nprobe` nearest lists; default: the database's own number."""
        queries = np.ascontiguousarray(queries, np.float32)
        if self._codec is None or self._centroids is None:
            nothing = np.empty((len(queries), 0), np.float32)
            return PreparedQueries(queries, nothing, nothing.astype(np.int64), nothing)
        transformed = transform(self._codec, queries)
        nprobe = min(self._nprobe if nprobe is None else nprobe, self.num_lists)
        list_distances, lists = self._centroids.nearest(transformed, nprobe)
        return PreparedQueries(queries, transformed, lists, list_distances)


def transform(index: faiss.Index, keys: np.ndarray) -> np.ndarray:
    """Keys or queries, float32 [n, D], as the inverted lists of an index take them: float32 [n, D']."""
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPreTransform):
        return keys
    chain: Any = index.chain
    for number in range(chain.size()):
        step: Any = faiss.downcast_VectorTransform(chain.at(number))
        keys = _linear(step, keys) if isinstance(step, faiss.LinearTransform) else step.apply(keys)
    return keys


def _linear(step: Any, keys: np.ndarray) -> np.ndarray:
    """A x + b, every element its own dot product."""
    matrix = faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in)
    result = np.empty((len(keys), step.d_out), np.float32)
    pointer = faiss.swig_ptr
    columns = np.ascontiguousarray(
        np.broadcast_to(np.arange(step.d_out), (min(len(keys), _ROWS_PER_PRODUCT), step.d_out))
    )
    for start in range(0, len(keys), _ROWS_PER_PRODUCT):
        block, target = keys[start : start + _ROWS_PER_PRODUCT], result[start : start + _ROWS_PER_PRODUCT]
        FAISS.fvec_inner_products_by_idx(
            pointer(target), pointer(block), pointer(matrix), pointer(columns), step.d_in, len(block), step.d_out
        )
    if step.have_bias:
        result += faiss.vector_to_array(step.b)
    return result
