"""What does it cost to look neighbours up before a chunk is complete? Bits per byte of held-out documents, whose
neighbours are found by whole chunks, and by as many of their first tokens as `--prefetch` waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.bits_per_byte import document_groups, score_documents
from retro_ray.evaluation.scores import BitsPerByte
from retro_ray.generation.engine import prefetch_length
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval.retriever import ChunkRetriever

_CHUNKS_PER_CALL = 1024


def prefetch_cost(
    model: RetroModel, database: Database, store: ChunkStore, retriever: ChunkRetriever
) -> dict[str, Any]:
    """Bits per byte of the documents of `store` without neighbours, with theirs, and with those of their beginnings."""
    m, k = database.chunk_length, model.config.num_neighbours

    def score(query_length: int) -> float:
        ids = _neighbours(store, retriever, query_length, k)
        return _score(model, store, database, lambda chunks: ids[chunks])

    scores = {"bits_per_byte_on": score(m), "bits_per_byte_prefetch": score(prefetch_length(m))}
    return {**scores, "prefetch_cost_share": scores["bits_per_byte_prefetch"] / scores["bits_per_byte_on"] - 1}


def _neighbours(store: ChunkStore, retriever: ChunkRetriever, query_length: int, k: int) -> np.ndarray:
    """int64 [num_chunks, k]: found by the first `query_length` tokens of each chunk."""
    found = []
    for start in range(0, store.num_chunks, _CHUNKS_PER_CALL):
        rows = np.arange(start, min(start + _CHUNKS_PER_CALL, store.num_chunks))
        ends = np.minimum(store.lengths(rows), query_length)
        chunks = [tokens[:end].tolist() for tokens, end in zip(store.tokens(rows), ends, strict=True)]
        found.append(retriever.retrieve_chunks(chunks, k).chunk_ids)
    return np.concatenate(found)


def _score(
    model: RetroModel, store: ChunkStore, database: Database, neighbours: Callable[[np.ndarray], np.ndarray]
) -> float:
    total = BitsPerByte()
    for group in document_groups(np.arange(store.num_documents), store.document_num_chunks):
        total += score_documents(model, store, database, group, mode="on", neighbours=neighbours)
    return total.value
