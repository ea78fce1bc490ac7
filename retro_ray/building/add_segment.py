"""From documents to the files of a segment: chunked and embedded in this process, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from retro_ray.building.segment_writer import SegmentWriter, chunk_rows, document_row
from retro_ray.database.format import Partition
from retro_ray.database.store import ChunkStore
from retro_ray.index.keys import write_keys
from retro_ray.progress import progress_bar
from retro_ray.text.chunking import ChunkedDocument, chunk_document
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import TextTokenizer

PROGRESS_DELAY_S = 1.0
"""Edits of a moment show no bar: a service makes many of them."""
_CHUNKS_PER_BLOCK = 1024


class Embedder(Protocol):
    """What an edit needs of a ChunkEmbedder."""

    fingerprint: str
    dim: int

    def embed(self, texts: list[str]) -> np.ndarray:
        """Keys of `texts`: float32 [n, dim]."""
        ...


def write_documents(
    folder: Path, documents: Iterable[Document], tokenizer: TextTokenizer, chunk_length: int
) -> SegmentWriter:
    """Chunk documents, and write their chunks under `folder`.

    Returns:
        The writer, closed: it knows what was written.
    """
    chunked = (chunk_document(document, tokenizer, chunk_length) for document in documents)
    return write_chunked(folder, chunked, chunk_length, tokenizer.vocab_size)


def write_chunked(
    folder: Path, documents: Iterable[ChunkedDocument], chunk_length: int, vocab_size: int
) -> SegmentWriter:
    """`write_documents` of documents that are chunks already; they may become so while they are taken."""
    bar = progress_bar(None, "chunk", " documents", delay_s=PROGRESS_DELAY_S)
    with SegmentWriter(folder, chunk_length, vocab_size) as writer, bar:
        block: list[ChunkedDocument] = []
        for document in documents:
            block.append(document)
            bar.update()
            if sum(len(chunked.tokens) for chunked in block) >= _CHUNKS_PER_BLOCK:
                _write_block(writer, block, vocab_size)
                block = []
        _write_block(writer, block, vocab_size)
    return writer


def _write_block(writer: SegmentWriter, block: list[ChunkedDocument], vocab_size: int) -> None:
    if not block:
        return
    tokens, lengths, num_bytes = (
        np.concatenate([getattr(one, name) for one in block]) for name in ("tokens", "lengths", "num_bytes")
    )
    documents = pa.Table.from_pylist([document_row(one) for one in block])
    writer.add(documents, [chunk_rows(tokens, lengths, num_bytes, vocab_size)])


def embed_segment(
    directory: Path, segment: Partition, chunk_length: int, tokenizer: TextTokenizer, embedder: Embedder
) -> None:
    """Write the keys of a segment's chunks, with a progress bar."""
    store = ChunkStore(directory, segment, chunk_length)
    with progress_bar(store.num_chunks, "embed", " chunks", delay_s=PROGRESS_DELAY_S) as bar:

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, store.num_chunks, _CHUNKS_PER_BLOCK):
                rows = np.arange(start, min(start + _CHUNKS_PER_BLOCK, store.num_chunks))
                tokens, lengths = store.tokens(rows), store.lengths(rows).tolist()
                real = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
                yield embedder.embed(tokenizer.decode_batch(real))
                bar.update(len(rows))

        write_keys(directory / segment.keys, blocks(), store.num_chunks, embedder.dim)
