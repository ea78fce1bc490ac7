"""From what segments and shards list to the neighbours: a definition that does not depend on them.

With C the number of candidates wanted, the neighbours of a query are the k smallest (distance,
chunk_id) among the rows whose *coarse* distance, that of their codes, is at most the C-th smallest
one of all rows: all ties at that value included. Every part lists its own best rows with their coarse
distances, and says from which coarse distance on it may have left some out; so the merge can tell
whether it has seen enough. In an exact index the coarse distance is the distance, and C is k. So it is with graphs, as
far as they lead to the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """The best rows of one part of a database for Q queries, in any order."""

    coarse: np.ndarray
    """float32 [Q, C], infinity where there is no row."""
    distances: np.ndarray
    """float32 [Q, C]: squared L2 between query and key; infinity where there is no row."""
    ids: np.ndarray
    """int64 [Q, C]: rows, or chunk_ids; -1 where there is none."""
    hidden_from: np.ndarray
    """float32 [Q]: every row that is not listed has at least this coarse distance; infinity: all are listed."""

    def with_base(self, chunk_id_base: int) -> Candidates:
        """The same with chunk_ids in place of a segment's rows."""
        ids = np.where(self.ids < 0, -1, self.ids + chunk_id_base)
        return Candidates(self.coarse, self.distances, ids, self.hidden_from)

    @classmethod
    def concatenate(cls, parts: Sequence[Candidates]) -> Candidates:
        """Those of several batches of queries as of one; all with the same C."""
        names = ("coarse", "distances", "ids", "hidden_from")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Merged:
    """The neighbours of Q queries, as far as the candidates tell."""

    distances: np.ndarray
    """float32 [Q, k], ascending, ties by id; infinity where there is none."""
    ids: np.ndarray
    """int64 [Q, k]; -1 where there is none."""
    unfinished: np.ndarray
    """bool [Q]: rows that were not listed could change the answer."""


def merge_candidates(parts: Sequence[Candidates], k: int, num_candidates: int) -> Merged:
    """The `k` neighbours of each query, by the definition above with C = `num_candidates`.

    Args:
        parts: what each segment or shard lists, for the same queries.
        k: neighbours per query.
        num_candidates: C, at least k.
    """
    coarse, distances, ids = (
        _joined([getattr(part, name) for part in parts]) for name in ("coarse", "distances", "ids")
    )
    hidden_from = np.min([part.hidden_from for part in parts], axis=0)
    if coarse.shape[1] > num_candidates:
        cut = np.partition(coarse, num_candidates - 1, axis=1)[:, num_candidates - 1]
        distances = np.where(coarse <= cut[:, None], distances, np.inf)
    else:
        cut = np.full(len(coarse), np.inf, np.float32)
    order = nearest(distances, ids, k)
    distances = pad_columns(np.take_along_axis(distances, order, 1), k, np.inf)
    ids = np.where(np.isinf(distances), -1, pad_columns(np.take_along_axis(ids, order, 1), k, -1))
    return Merged(distances, ids, (hidden_from <= cut) & (hidden_from < np.inf))


def nearest(distances: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Columns of the `k` nearest of C candidates, per query: int64 [Q, min(k, C)].

    Ascending by distance, ties by id; places without a candidate (distance infinity) come last.

    Args:
        distances: float32 [Q, C], not negative.
        ids: int64 [Q, C].
        k: how many to keep.
    """
    packed = pack_distances(distances)
    packed.sort(axis=1)
    order = unpack_columns(packed[:, :k])
    # Where equal distances follow each other, the ids decide.
    bits = packed[:, : k + 1] >> np.uint64(32)
    infinity = np.uint64(np.float32(np.inf).view(np.uint32))
    tied = ((bits[:, 1:] == bits[:, :-1]) & (bits[:, 1:] < infinity)).any(axis=1)
    order[tied] = np.lexsort((ids[tied], distances[tied]), axis=-1)[:, :k]
    return order


def pack_distances(distances: np.ndarray) -> np.ndarray:
    """Distance and column in one integer, uint64 [Q, C], for distances float32 [Q, C] that are not negative.

    They sort like their bits, and NumPy sorts 64-bit integers several times faster than it sorts by two keys.
    """
    # Adding zero makes -0.0 positive.
    packed = (np.ascontiguousarray(distances, np.float32) + np.float32(0)).view(np.uint32).astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= np.arange(distances.shape[1], dtype=np.uint64)
    return packed


def unpack_columns(packed: np.ndarray) -> np.ndarray:
    """The columns, int64, of what `pack_distances` gave."""
    return (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def pad_columns(values: np.ndarray, k: int, fill: float) -> np.ndarray:
    """`values` [Q, C <= k, ...] widened to k columns with `fill`."""
    missing = k - values.shape[1]
    if missing <= 0:
        return values
    return np.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2), constant_values=fill)


def _joined(columns: list[np.ndarray]) -> np.ndarray:
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
