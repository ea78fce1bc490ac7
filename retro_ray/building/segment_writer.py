"""Writing the chunks and documents of one partition, block by block, in the order of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from retro_ray.database.arrow_rows import ArrowRowWriter, fixed_size_lists
from retro_ray.database.document_index import write_document_index
from retro_ray.database.format import DOCUMENTS_SCHEMA, Partition, chunks_schema, token_type
from retro_ray.database.split import document_hash
from retro_ray.text.chunking import ChunkedDocument


def document_row(document: ChunkedDocument) -> dict[str, Any]:
    """What `SegmentWriter.add` takes of a document, beside its chunks."""
    return {
        "id": document.id,
        "title": document.title,
        "source": document.source,
        "num_chunks": len(document.tokens),
        "num_bytes": int(document.num_bytes.sum()),
    }


def chunk_rows(tokens: np.ndarray, lengths: np.ndarray, num_bytes: np.ndarray, vocab_size: int) -> pa.Table:
    """Chunks as `SegmentWriter.add` takes them: tokens [n, m], lengths [n], num_bytes [n]."""
    return pa.table(
        {
            "tokens": fixed_size_lists(tokens, token_type(vocab_size)),
            "length": pa.array(lengths, pa.uint16()),
            "num_bytes": pa.array(num_bytes, pa.int32()),
        }
    )


class SegmentWriter:
    """Writes chunks.arrow, documents.arrow and ids.npy of a partition; they appear when it closes.

    Memory is bounded by a block, and eight bytes per document. Keys, index and neighbours are the
    caller's.
    """

    def __init__(self, folder: Path, chunk_length: int, vocab_size: int) -> None:
        self._folder = folder
        self._schema = chunks_schema(chunk_length, vocab_size)
        self._hashes: list[np.ndarray] = []
        self._files = ExitStack()
        self.num_documents = self.num_chunks = self.num_tokens = self.num_bytes = 0

    def __enter__(self) -> SegmentWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._chunks = self._files.enter_context(ArrowRowWriter(self._folder / "chunks.arrow", self._schema))
        self._documents = self._files.enter_context(ArrowRowWriter(self._folder / "documents.arrow", DOCUMENTS_SCHEMA))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if kind is None:
            write_document_index(
                self._folder / "ids.npy", np.concatenate([np.empty(0, np.uint64), *self._hashes]).astype(np.uint64)
            )

    def add(self, documents: pa.Table, chunks: Iterable[pa.Table]) -> None:
        """Append documents with all their chunks.

        Args:
            documents: columns id, title, source, num_chunks, num_bytes.
            chunks: columns tokens, length, num_bytes: the chunks of these documents one after another, divided
                anywhere.
        """
        num_chunks = documents["num_chunks"].to_numpy()
        ends = self.num_chunks + np.cumsum(num_chunks)
        described = documents.select(["id", "title", "source", "num_chunks", "num_bytes"])
        rows = described.append_column("first_row", pa.array(ends - num_chunks))
        self._documents.write(rows.select(DOCUMENTS_SCHEMA.names))
        for block in chunks:
            row = self.num_chunks + np.arange(block.num_rows)
            document = self.num_documents + np.searchsorted(ends, row, side="right")
            columns = block.select(["tokens", "length", "num_bytes"])
            self._chunks.write(columns.append_column("document", pa.array(document, pa.int32())))
            self.num_chunks += block.num_rows
            self.num_tokens += int(block["length"].to_numpy().sum())
        if len(ends) and self.num_chunks != ends[-1]:
            raise ValueError(f"{self._folder}: {ends[-1]} chunks were announced, {self.num_chunks} came")
        self._hashes.append(np.array([document_hash(name) for name in documents["id"].to_pylist()], np.uint64))
        self.num_documents += documents.num_rows
        self.num_bytes += int(documents["num_bytes"].to_numpy().sum())

    def partition(self, name: str, chunk_id_base: int = -1, shard: int = -1) -> Partition:
        """What was written. Its folder is given relative to the parent of the build's or edit's folder."""
        return Partition(
            name=name,
            shard=shard,
            chunk_id_base=chunk_id_base,
            num_documents=self.num_documents,
            num_chunks=self.num_chunks,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            folder=f"{self._folder.parent.name}/{self._folder.name}",
        )
