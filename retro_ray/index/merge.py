"""Merging the answers of shards into the answer of the whole database."""

from __future__ import annotations

import numpy as np


def nearest(distances: np.ndarray, chunk_ids: np.ndarray, k: int) -> np.ndarray:
    """Columns of the `k` nearest of C candidates, per query: int64 [Q, min(k, C)].

    Ascending by distance, ties by chunk_id; places without a candidate (chunk_id -1) come last.

    Args:
        distances: float32 [Q, C].
        chunk_ids: int64 [Q, C], -1 where there is no candidate.
        k: how many to keep.
    """
    distances = np.where(chunk_ids < 0, np.inf, distances)
    # lexsort sorts by its last key first: absent candidates behind equal (infinite) distances.
    order = np.lexsort((chunk_ids, distances, chunk_ids < 0), axis=-1)
    return order[:, :k]


def pad_columns(values: np.ndarray, k: int, fill: float) -> np.ndarray:
    """`values` [Q, C <= k, ...] widened to k columns with `fill`."""
    missing = k - values.shape[1]
    if missing <= 0:
        return values
    return np.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2), constant_values=fill)
