"""Building indexes: which kind, trained once, filled segment by segment.

The codec (coarse quantizer, product quantizer) of a FAISS index is trained once on a random sample of all segments and
shared by them: then a search over shards returns what one index over all keys would. An index holds
codes only; the keys lie beside it. An exact index is its keys, and needs no file. A graph is built from its segment's
keys alone (graph.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retro_ray.index.encoder import transform
from retro_ray.index.exact import unbatched_distances
from retro_ray.index.graph import Graph, has_graph
from retro_ray.index.keys import key_blocks, read_keys
from retro_ray.index.spec import IndexSpec

MAX_EXACT_CHUNKS = 60_000
"""Up to here an exact search is fast enough, and needs neither training nor tuning."""
TRAINING_KEYS_PER_LIST = 128
"""Keys per inverted list that k-means is trained on; FAISS warns under 39 and gains nothing over 256."""
_MIN_NUM_LISTS = 64
_LISTS = re.compile(r"(?<=IVF)\d+")
_WRITE_BYTES = 1 << 24


def num_lists_for(num_chunks: int) -> int:
    """Inverted lists of an index over so many keys: about the square root, a power of two.

    Twice as many are no faster as a whole, and slower in shards: each pays for every list it visits.
    """
    return max(_MIN_NUM_LISTS, 2 ** round(math.log2(1.2 * math.sqrt(max(1, num_chunks)))))


def num_lists_of(factory: str) -> int:
    """Inverted lists that FAISS's factory string of a compressed index asks for."""
    return int(_LISTS.findall(factory)[0])


def with_lists(factory: str, num_lists: int) -> str:
    """The same index with another number of inverted lists."""
    return _LISTS.sub(str(num_lists), factory)


def num_training_keys(spec: IndexSpec, num_chunks: int) -> int:
    """How many keys `train_index` wants: 0 where there is no codec."""
    if not spec.has_codec:
        return 0
    return min(num_chunks, TRAINING_KEYS_PER_LIST * num_lists_of(spec.factory))


def train_index(spec: IndexSpec, dim: int, sample: np.ndarray) -> faiss.Index:
    """The codec of a compressed index: empty, trained on `sample`, float32 [n, dim]."""
    index = faiss.index_factory(dim, spec.factory, faiss.METRIC_L2)
    _balance_components(index)
    index.train(np.ascontiguousarray(sample, np.float32))
    return index


def _balance_components(index: faiss.Index) -> None:
    """Have every sub-quantizer get principal components of about the same variance together.

    They need a fifth fewer candidates then than after a random rotation.
    """
    if not isinstance(index, faiss.IndexPreTransform):
        return
    chain: Any = index.chain
    first = faiss.downcast_VectorTransform(chain.at(0))
    quantizer: Any = getattr(faiss.downcast_index(index.index), "pq", None)
    if isinstance(first, faiss.PCAMatrix) and quantizer is not None:
        first.balanced_bins = quantizer.M


def fill_index(index: faiss.Index, key_blocks: Iterable[np.ndarray]) -> faiss.Index:
    """Add keys, block by block, in row order: row i gets FAISS id i, and codes that depend on its key alone."""
    lists = faiss.downcast_index(faiss.extract_index_ivf(index))
    for keys in key_blocks:
        if not len(keys):
            continue
        with unbatched_distances():
            lists.add(transform(index, np.ascontiguousarray(keys, np.float32)))
    index.ntotal = lists.ntotal
    return index


def index_segment(spec: IndexSpec, codec: Path | None, keys: Path, target: Path) -> bool:
    """Write what a segment is searched by; False where that is its keys alone, and nothing is written.

    Args:
        spec: of the database.
        codec: file of the trained, empty index; None for an exact index and a graph.
        keys: the segment's keys.npy.
        target: file to write.

    Raises:
        ConfigError: it is to be a graph, for which this machine has no library.
    """
    if codec is not None:
        write_index(fill_index(read_index(codec), key_blocks(keys)), target)
        return True
    mapped = read_keys(keys)
    if not has_graph(spec, len(mapped)):
        return False
    Graph.build(spec, mapped).save(target)
    return True


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


def read_index(path: Path, mmap: bool = False) -> faiss.Index:
    """Read an index into memory, or map it."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
