"""Building FAISS indexes: which kind, trained once, filled shard by shard.

The codec (coarse quantizer, product quantizer) is trained once on a random sample of all shards and
shared by them: then a search over shards returns what one index over all keys would.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np

from retro_ray.database.format import IndexSpec

MAX_EXACT_CHUNKS = 100_000
"""Up to here an exact search is fast enough, and needs neither training nor tuning."""
TRAINING_KEYS_PER_LIST = 64
"""Keys per inverted list that k-means is trained on; FAISS warns under 39 and gains nothing over 256."""
_MIN_NUM_LISTS = 64
_WRITE_BYTES = 1 << 24


def choose_index(num_chunks: int, dim: int) -> IndexSpec:
    """The index for a database of `num_chunks` keys.

    Exact for small databases. Above, inverted lists over 4-bit fast-scan product quantization (two
    dimensions per code), whose candidates are re-ranked by 8-bit codes.
    """
    if num_chunks <= MAX_EXACT_CHUNKS or dim % 2:
        return IndexSpec(factory="Flat")
    num_lists = max(_MIN_NUM_LISTS, 2 ** round(math.log2(2 * math.sqrt(num_chunks))))
    return IndexSpec(
        factory=f"IVF{num_lists},PQ{dim // 2}x4fs,Refine(SQ8)",
        nprobe=max(16, num_lists // 16),
        refine_factor=10,
    )


def num_training_keys(spec: IndexSpec, num_chunks: int) -> int:
    """How many keys `train_index` wants: 0 for an exact index."""
    if spec.is_exact:
        return 0
    num_lists = int(spec.factory.split(",")[0].removeprefix("IVF"))
    return min(num_chunks, TRAINING_KEYS_PER_LIST * num_lists)


def train_index(spec: IndexSpec, dim: int, sample: np.ndarray) -> faiss.Index:
    """An empty index with its codec trained on `sample`, float32 [n, dim]."""
    index = faiss.index_factory(dim, spec.factory, faiss.METRIC_L2)
    if not spec.is_exact:
        index.train(np.ascontiguousarray(sample, np.float32))
    return index


def fill_index(index: faiss.Index, key_blocks: Iterable[np.ndarray]) -> faiss.Index:
    """Add keys, block by block, in row order: row i gets FAISS id i."""
    for keys in key_blocks:
        index.add(np.ascontiguousarray(keys, np.float32))
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index so that it appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        # Through a file of Python's: FAISS's own passes over what goes wrong at its closing, such as a full disk.
        with temporary.open("wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, _WRITE_BYTES))  # pyright: ignore[reportAttributeAccessIssue]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_index(path: Path) -> faiss.Index:
    """Read an index into memory."""
    return faiss.read_index(str(path))
