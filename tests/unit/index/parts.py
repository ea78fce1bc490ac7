"""Databases of one array of keys, cut into segments and searched as retrieval does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import faiss
import numpy as np

from retro_ray.index.build import fill_index
from retro_ray.index.encoder import PreparedQueries, QueryEncoder
from retro_ray.index.graph import Graph, has_graph
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted, search_parts
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import IndexSpec


class Parts:
    """Segments of consecutive keys, row i of the keys being chunk i.

    Args:
        spec: the index.
        codec: trained and empty; None for an exact index and a graph.
        keys: float32 [n, D].
        cuts: ascending rows at which a new segment starts; equal ones make empty segments.
        deleted: bool [n].
    """

    def __init__(
        self,
        spec: IndexSpec,
        codec: faiss.Index | None,
        keys: np.ndarray,
        cuts: Sequence[int] = (),
        deleted: np.ndarray | None = None,
    ) -> None:
        self._spec = spec
        self._encoder = QueryEncoder(spec, codec)
        self._num_rows = len(keys)
        self._shards = []
        self.num_asked: list[int] = []
        """Queries of each round of the searches so far."""
        for start, stop in pairwise([0, *cuts, len(keys)]):
            own = np.ascontiguousarray(keys[start:stop])
            index: faiss.Index | Graph | None = None
            if codec is not None:
                index = fill_index(faiss.clone_index(codec), [own])
            elif has_graph(spec, len(own)):
                index = Graph.build(spec, own)
            self._shards.append((start, IndexShard(spec, own, index, None if deleted is None else deleted[start:stop])))

    def search(self, queries: np.ndarray, k: int, excluded: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Distances float32 [Q, k] and chunk_ids int64 [Q, k]."""
        return search_parts(queries, k, self._spec, self._encoder, self._ask, excluded)

    def _ask(self, queries: PreparedQueries, wanted: Wanted, excluded: np.ndarray | None) -> list[Candidates]:
        answers = []
        self.num_asked.append(len(queries))
        for base, shard in self._shards:
            rows = None
            if excluded is not None:
                # The part of each range that lies in this segment.
                first, last = (
                    np.maximum(excluded[:, 0] - base, 0),
                    np.minimum(excluded[:, 1] - base, shard.num_rows - 1),
                )
                rows = np.where((excluded[:, :1] < 0) | (first > last)[:, None], -1, np.stack([first, last], axis=1))
            num_candidates = wanted.of_part(shard.num_rows / max(1, self._num_rows))
            answers.append(shard.candidates(queries, num_candidates, rows).with_base(base))
        return answers


def defined_neighbours(
    spec: IndexSpec,
    codec: faiss.Index | None,
    keys: np.ndarray,
    query: np.ndarray,
    k: int,
    allowed: np.ndarray,
) -> list[tuple[float, int]]:
    """What index/merge.py defines, for one query, in plain Python: ascending (distance, row)."""
    distances = ((keys.astype(np.float64) - query) ** 2).sum(1).astype(np.float32)
    if codec is None or not len(keys):
        return sorted((float(distances[row]), int(row)) for row in np.flatnonzero(allowed))[:k]
    index = fill_index(faiss.clone_index(codec), [keys])
    lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    encoder = QueryEncoder(spec, codec)
    nprobe = spec.nprobe
    while True:
        prepared = encoder.prepare(query[None], nprobe)
        lists.nprobe = prepared.lists.shape[1]
        # All rows of the visited lists.
        coarse, rows = lists.search_preassigned(
            prepared.transformed, len(keys), prepared.lists, prepared.list_distances
        )
        pairs = [(c, r) for c, r in zip(coarse[0], rows[0], strict=True) if r >= 0 and allowed[r]]
        pairs.sort()
        num_candidates = spec.num_candidates(k)
        cut = pairs[num_candidates - 1][0] if len(pairs) >= num_candidates else np.inf
        found = sorted((float(distances[row]), int(row)) for c, row in pairs if c <= cut)[:k]
        if len(found) == k or nprobe >= lists.nlist:
            return found
        nprobe *= 4
