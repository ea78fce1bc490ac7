"""The neighbours of every chunk of a partition, found once and stored (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from retro_ray.database.arrow_rows import fixed_size_lists, write_rows
from retro_ray.database.format import neighbours_schema
from retro_ray.database.store import ChunkStore, Database
from retro_ray.retrieval.rerank import Chunks, Reranker
from retro_ray.retrieval.retriever import Retriever

_QUERIES_PER_SEARCH = 4096


def write_neighbours(
    store: ChunkStore,
    retriever: Retriever,
    num_neighbours: int,
    path: Path,
    database: Database | None = None,
    advance: Callable[[int], object] | None = None,
) -> int:
    """Search the neighbours of all chunks of `store` by their stored keys and write them, row by row aligned.

    A chunk of the database gets none from its own document. Chunks of the validation split are in
    no database, so nothing is passed over for them.

    Args:
        store: whose chunks.
        retriever: finds them.
        num_neighbours: per chunk.
        path: of the file.
        database: that is searched; reranks what is found as its manifest says. Default: nothing is reranked.
        advance: told how many more chunks have theirs.

    Returns:
        Neighbours that were missing because the database was exhausted.
    """
    reranker = None
    if database is not None:
        reranker = Reranker.of(database, database.manifest.rerank, database.manifest.num_rerank_candidates)
    num_missing = 0

    def neighbours_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries, excluded = store.keys[rows], own_document_ids(store, rows)
        if reranker is None or database is None:
            return retriever.search_ids(queries, num_neighbours, excluded)
        num_candidates = max(num_neighbours, reranker.num_candidates)
        found = retriever.search_ids(queries, num_candidates, excluded)
        return reranker.order(database, Chunks(store.tokens(rows), store.lengths(rows)), *found, num_neighbours)

    def tables() -> Iterator[pa.Table]:
        nonlocal num_missing
        for start in range(0, store.num_chunks, _QUERIES_PER_SEARCH):
            rows = np.arange(start, min(start + _QUERIES_PER_SEARCH, store.num_chunks))
            distances, chunk_ids = neighbours_of(rows)
            num_missing += int((chunk_ids < 0).sum())
            columns = [fixed_size_lists(chunk_ids, pa.int64()), fixed_size_lists(distances, pa.float32())]
            yield pa.Table.from_arrays(columns, schema=neighbours_schema(num_neighbours))
            if advance is not None:
                advance(len(rows))

    write_rows(path, neighbours_schema(num_neighbours), tables())
    return num_missing


def own_document_ids(store: ChunkStore, rows: np.ndarray) -> np.ndarray | None:
    """First and last chunk_id of each chunk's own document, int64 [n, 2]; None for the validation split."""
    if store.chunk_id_base < 0:
        return None
    documents = store.document_of(rows)
    first = store.document_first_row[documents] + store.chunk_id_base
    return np.stack([first, first + store.document_num_chunks[documents] - 1], axis=1)
