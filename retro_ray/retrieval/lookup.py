"""What is shown of neighbours: their tokens, and the documents they are from."""

from __future__ import annotations

import numpy as np

from retro_ray.database.store import Database, DocumentRef
from retro_ray.retrieval.retriever import NeighbourSet


def look_up(
    database: Database, distances: np.ndarray, chunk_ids: np.ndarray, missing_shards: tuple[int, ...] = ()
) -> NeighbourSet:
    """An answer with all that a reader needs, from distances float32 [Q, K] and chunk_ids int64 [Q, K]."""
    tokens, mask = database.neighbour_tokens(chunk_ids)
    return NeighbourSet(
        distances,
        chunk_ids,
        tokens,
        mask,
        documents_of(database, chunk_ids),
        missing_shards,
        database.manifest.generation,
    )


def documents_of(database: Database, chunk_ids: np.ndarray) -> tuple[tuple[DocumentRef | None, ...], ...]:
    """The document of each chunk, [Q][K]; None where chunk_id is -1. Each document is read once."""
    found = np.full(chunk_ids.size, None, object)
    segment_of, row_of = database.locate(chunk_ids.reshape(-1))
    for segment in np.unique(segment_of[segment_of >= 0]):
        chosen = np.flatnonzero(segment_of == segment)
        store = database.segments[segment]
        documents, place = np.unique(store.document_of(row_of[chosen]), return_inverse=True)
        refs = np.empty(len(documents), object)
        refs[:] = store.document_refs(documents)
        found[chosen] = refs[place]
    return tuple(map(tuple, found.reshape(chunk_ids.shape).tolist()))
