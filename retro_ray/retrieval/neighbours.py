"""The neighbours of every chunk of a partition, found once and stored (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from retro_ray.database.arrow_rows import fixed_size_lists, write_rows
from retro_ray.database.format import neighbours_schema
from retro_ray.database.store import ChunkStore
from retro_ray.retrieval.retriever import Retriever

_QUERIES_PER_SEARCH = 4096


def write_neighbours(store: ChunkStore, retriever: Retriever, num_neighbours: int, path: Path) -> int:
    """Search the neighbours of all chunks of `store` by their stored keys and write them, row by row aligned.

    A chunk of the database gets none from its own document. Chunks of the validation split are in
    no database, so nothing is passed over for them.

    Returns:
        Neighbours that were missing because the database was exhausted.
    """
    num_missing = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal num_missing
        for start in range(0, store.num_chunks, _QUERIES_PER_SEARCH):
            rows = np.arange(start, min(start + _QUERIES_PER_SEARCH, store.num_chunks))
            queries = store.keys[rows]
            distances, chunk_ids = retriever.search_ids(queries, num_neighbours, own_document_ids(store, rows))
            num_missing += int((chunk_ids < 0).sum())
            columns = [fixed_size_lists(chunk_ids, pa.int64()), fixed_size_lists(distances, pa.float32())]
            yield pa.Table.from_arrays(columns, schema=neighbours_schema(num_neighbours))

    write_rows(path, neighbours_schema(num_neighbours), tables())
    return num_missing


def own_document_ids(store: ChunkStore, rows: np.ndarray) -> np.ndarray | None:
    """First and last chunk_id of each chunk's own document, int64 [n, 2]; None for the validation split."""
    if store.chunk_id_base < 0:
        return None
    documents = store.document_of(rows)
    first = store.document_first_row[documents] + store.chunk_id_base
    return np.stack([first, first + store.document_num_chunks[documents] - 1], axis=1)
