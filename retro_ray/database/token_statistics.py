"""In how many chunks of a database each token occurs: what tells rare words from common ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from retro_ray.database.store import ChunkStore
from retro_ray.errors import DatabaseError

_CHUNKS_PER_BLOCK = 1 << 14


def num_holding(stores: Iterable[ChunkStore], vocab_size: int) -> np.ndarray:
    """How many chunks of all `stores` hold each token: int64 [V]."""
    total = np.zeros(vocab_size, np.int64)
    for store in stores:
        for start in range(0, store.num_chunks, _CHUNKS_PER_BLOCK):
            rows = np.arange(start, min(start + _CHUNKS_PER_BLOCK, store.num_chunks))
            total += _num_holding(store.tokens(rows), store.lengths(rows), vocab_size)
    return total


def _num_holding(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> np.ndarray:
    """Of chunks as padded tokens, int64 [n, m]."""
    padding = np.arange(tokens.shape[1]) >= lengths[:, None]
    ordered = np.sort(np.where(padding, vocab_size, tokens), axis=1)
    is_first = np.ones(ordered.shape, bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return np.bincount(ordered[is_first], minlength=vocab_size + 1)[:vocab_size]


def write_token_statistics(path: Path, holding: np.ndarray, num_chunks: int) -> None:
    """Write both as one array, int64 [V + 1] with the number of chunks last, that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, np.append(holding, num_chunks).astype(np.int64), allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_token_statistics(path: Path) -> tuple[np.ndarray, int]:
    """What `write_token_statistics` wrote.

    Raises:
        DatabaseError: the file is missing or damaged.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error
    return values[:-1], int(values[-1])
