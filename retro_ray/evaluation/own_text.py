"""Text to score that no database holds: chunked, embedded and given neighbours as a build does it for
the validation split.

It lies in a folder of its own, as files that any worker can map:

    FOLDER/input/documents/    chunks.arrow, documents.arrow, ids.npy, keys.npy, neighbours.arrow
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_ray.building.add_segment import Embedder, embed_segment, write_chunked
from retro_ray.config import RetrievalConfig
from retro_ray.database.arrow_rows import ArrowRows
from retro_ray.database.format import Partition, file_record
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import InputError
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import write_neighbours
from retro_ray.text.chunking import ChunkedDocument
from retro_ray.training.windows import NeighbourSource


@dataclass(frozen=True)
class ScoredText:
    """Where documents to score lie: the validation split of a database, or a folder of `write_own_text`."""

    directory: Path
    partition: Partition
    neighbours: Path | None
    """File of their neighbours; None: they have none."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the chunks: equal for equal texts, cut by the same tokenizer."""
        return file_record(self.directory / self.partition.chunks).sha256

    def open(self, chunk_length: int) -> ChunkStore:
        """Their chunks."""
        return ChunkStore(self.directory, self.partition, chunk_length)


class NeighbourSearch:
    """Finds the neighbours of text that is not stored, in one generation of a database.

    Args:
        database: to search in; later edits of it are not seen.
        embedder: that it was built with.
    """

    def __init__(self, database: Database, embedder: Embedder) -> None:
        self.embedder = embedder
        self._retriever = LocalRetriever.open(database, RetrievalConfig(mmap=True), pinned=True)
        self._database = database

    def write(self, store: ChunkStore, num_neighbours: int, path: Path) -> None:
        """The neighbours of all chunks of `store`, which has keys: found as those of the validation split are."""
        # So many at least, as an approximate index may answer otherwise when asked for fewer.
        count = max(num_neighbours, self._database.manifest.num_neighbours)
        write_neighbours(store, self._retriever, count, path, self._database)


def write_own_text(
    folder: Path,
    documents: Iterable[ChunkedDocument],
    database: Database,
    search: NeighbourSearch | None,
    num_neighbours: int = 0,
) -> ScoredText:
    """Make documents ready to be scored.

    Args:
        folder: for their files; exists.
        documents: chunked with the database's tokenizer and chunk length.
        database: that the neighbours come from.
        search: finds them; None: nothing is embedded and there are no neighbours, for retrieval off.
        num_neighbours: per chunk, at least.

    Raises:
        InputError: there are no documents.
    """
    manifest = database.manifest
    writer = write_chunked(folder / "input" / "documents", documents, manifest.chunk_length, manifest.vocab_size)
    if not writer.num_documents:
        raise InputError("no documents to score: give files that hold some")
    partition = writer.partition("input")
    if search is None:
        return ScoredText(folder, partition, None)
    embed_segment(folder, partition, manifest.chunk_length, database.tokenizer, search.embedder)
    text = ScoredText(folder, partition, folder / partition.neighbours)
    search.write(text.open(manifest.chunk_length), num_neighbours, folder / partition.neighbours)
    return text


def first_neighbours(path: Path, num_neighbours: int) -> NeighbourSource:
    """The first `num_neighbours` of the neighbours in a file that `write_neighbours` wrote."""
    rows = ArrowRows(path)
    return lambda chunks: rows.gather("chunk_ids", chunks)[:, :num_neighbours]


def document_tokens(store: ChunkStore, document: int) -> np.ndarray:
    """int64 [n]: the tokens of a document, the document-start token first."""
    rows = np.arange(*store.document_rows(document))
    is_real = np.arange(store.chunk_length) < store.lengths(rows)[:, None]
    return store.tokens(rows)[is_real]


def count_words(text: str) -> int:
    """Words of a text, counted as EleutherAI's lm_eval counts them for word perplexity."""
    return len(re.split(r"\s+", text))


def count_document_words(database: Database, store: ChunkStore, documents: Sequence[int] | np.ndarray) -> int:
    """Words of documents, of their text as the tokenizer gives it back."""
    texts = (database.tokenizer.decode(document_tokens(store, int(document))) for document in documents)
    return sum(count_words(text) for text in texts)
