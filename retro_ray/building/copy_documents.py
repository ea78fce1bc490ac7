"""Copying documents from segments into a new one, block by block, with their chunks and keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from retro_ray.building.segment_writer import SegmentWriter, chunk_rows
from retro_ray.database.format import Manifest, Partition
from retro_ray.database.store import ChunkStore
from retro_ray.index.keys import write_keys

_ROWS_PER_BLOCK = 1 << 14


@dataclass(frozen=True)
class DocumentRun:
    """Documents of one segment, in order."""

    store: ChunkStore
    documents: np.ndarray
    """int64 [n], rows in documents.arrow."""

    @classmethod
    def whole(cls, store: ChunkStore) -> DocumentRun:
        return cls(store, np.arange(store.num_documents))

    def row_blocks(self) -> Iterator[np.ndarray]:
        """Rows of the documents' chunks, a block at a time."""
        first = self.store.document_first_row[self.documents]
        count = self.store.document_num_chunks[self.documents]
        before = np.cumsum(count) - count
        rows = np.repeat(first - before, count) + np.arange(count.sum())
        for start in range(0, len(rows), _ROWS_PER_BLOCK):
            yield rows[start : start + _ROWS_PER_BLOCK]

    def chunks(self, vocab_size: int) -> Iterator[pa.Table]:
        for rows in self.row_blocks():
            store = self.store
            yield chunk_rows(store.tokens(rows), store.lengths(rows), store.num_bytes(rows), vocab_size)


def copy_documents(runs: Sequence[DocumentRun], folder: Path, manifest: Manifest) -> Partition:
    """Write chunks, documents and keys of a new segment under `folder`, named as it.

    Args:
        runs: what goes into it, in order.
        folder: in the folder of an edit.
        manifest: of the database.

    Returns:
        The segment, without shard and chunk_ids.
    """
    with SegmentWriter(folder, manifest.chunk_length, manifest.vocab_size) as writer:
        for run in runs:
            writer.add(run.store.documents(run.documents), run.chunks(manifest.vocab_size))
    keys = (run.store.keys[rows] for run in runs for rows in run.row_blocks())
    write_keys(folder / "keys.npy", keys, writer.num_chunks, manifest.key_dim)
    return writer.partition(folder.name)
