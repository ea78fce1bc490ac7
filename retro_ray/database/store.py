"""Reading a retrieval database: memory-mapped chunks, documents, keys and stored neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from retro_ray.database.arrow_rows import ArrowRows
from retro_ray.database.deleted import DeletedDocuments
from retro_ray.database.document_index import DocumentIndex
from retro_ray.database.format import Manifest, Partition, database_directory, file_problem, read_manifest
from retro_ray.errors import DatabaseError
from retro_ray.index.keys import read_keys
from retro_ray.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class DocumentRef:
    """Where a chunk comes from, for people and for citations."""

    id: str
    title: str
    source: str


class ChunkStore:
    """The chunks and documents of one partition, by row number, memory-mapped."""

    def __init__(self, directory: Path, partition: Partition, chunk_length: int) -> None:
        self.partition = partition
        self.chunk_length = chunk_length
        self.chunk_id_base = partition.chunk_id_base
        self.num_chunks = partition.num_chunks
        self._directory = Path(directory)
        self._rows = ArrowRows(self._directory / partition.chunks)
        if self._rows.num_rows != self.num_chunks:
            raise DatabaseError(
                f"{self._directory / partition.chunks} has {self._rows.num_rows} chunks, the manifest says "
                f"{self.num_chunks}: rebuild the database with jobs/index.py"
            )

    @cached_property
    def _documents(self) -> pa.Table:
        path = self._directory / self.partition.documents
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error

    @cached_property
    def document_first_row(self) -> np.ndarray:
        """int64 [num_documents]: the row at which each document starts."""
        return self._documents["first_row"].to_numpy()

    @cached_property
    def document_num_chunks(self) -> np.ndarray:
        """int64 [num_documents]."""
        return self._documents["num_chunks"].to_numpy()

    @cached_property
    def document_num_bytes(self) -> np.ndarray:
        """int64 [num_documents]: UTF-8 bytes of each document's text."""
        return self._documents["num_bytes"].to_numpy()

    @property
    def num_documents(self) -> int:
        return self.partition.num_documents

    @cached_property
    def keys(self) -> np.ndarray:
        """float32 [num_chunks, key_dim], memory-mapped: the embeddings that the chunks are found by."""
        return read_keys(self._directory / self.partition.keys)

    @cached_property
    def neighbours(self) -> ArrowRows:
        """Columns `chunk_ids` int64 and `distances` float32: [num_chunks, num_neighbours]."""
        return ArrowRows(self._directory / self.partition.neighbours)

    @cached_property
    def _document_index(self) -> DocumentIndex:
        return DocumentIndex(self._directory / self.partition.ids)

    def documents_of(self, document_id: str) -> list[int]:
        """Rows of the documents with this id; more than one where a version that was deleted stands beside another."""
        rows = self._document_index.rows(document_id)
        return [document for document in rows if self.document_ref(document).id == document_id]

    def map_files(self) -> None:
        """Open the documents and the stored neighbours, which are otherwise opened when they are first asked for."""
        _ = self._documents, self.neighbours

    def documents(self, documents: np.ndarray) -> pa.Table:
        """The rows `documents` (int64 [n]) of documents.arrow (DOCUMENTS_SCHEMA)."""
        return self._documents.take(pa.array(documents))

    def document_ref(self, document: int) -> DocumentRef:
        row = self._documents.slice(document, 1).to_pylist()[0]
        return DocumentRef(id=row["id"], title=row["title"], source=row["source"])

    def document_refs(self, documents: np.ndarray) -> list[DocumentRef]:
        """`document_ref` of each of many."""
        taken = self._documents.select(["id", "title", "source"]).take(pa.array(documents))
        return [DocumentRef(*values) for values in zip(*(column.to_pylist() for column in taken), strict=True)]

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, m]: padded token ids of the chunks at `rows`."""
        return self._rows.gather("tokens", rows).astype(np.int64)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: how many tokens of each chunk are real."""
        return self._rows.gather("length", rows).astype(np.int64)

    def num_bytes(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: UTF-8 bytes of text that each chunk stands for."""
        return self._rows.gather("num_bytes", rows).astype(np.int64)

    def document_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: the document (row in documents.arrow) that each chunk belongs to."""
        return self._rows.gather("document", rows).astype(np.int64)

    def document_rows(self, document: int) -> tuple[int, int]:
        """First row of a document, and the row after its last."""
        first = int(self.document_first_row[document])
        return first, first + int(self.document_num_chunks[document])

    def neighbour_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N, F] of the chunks at `rows`: each chunk and the next one of the same document.

        Args:
            rows: int64 [n]; -1 where there is no chunk.

        Returns:
            tokens int64 [n, 2m] (0 where nothing is) and mask bool [n, 2m] (True where a token is
            real). A chunk that ends its document has its F masked, never another document's text.
        """
        rows = np.asarray(rows, dtype=np.int64)
        m = self.chunk_length
        tokens = np.zeros((len(rows), 2 * m), np.int64)
        mask = np.zeros((len(rows), 2 * m), bool)
        present = np.flatnonzero(rows >= 0)
        if len(present) == 0:
            return tokens, mask
        here = rows[present]
        document = self.document_of(here)
        end_row = self.document_first_row[document] + self.document_num_chunks[document]
        continued = here + 1 < end_row
        for column, chosen, chunk in ((0, present, here), (m, present[continued], here[continued] + 1)):
            real = np.arange(m)[None, :] < self.lengths(chunk)[:, None]
            tokens[chosen, column : column + m] = np.where(real, self.tokens(chunk), 0)
            mask[chosen, column : column + m] = real
        return tokens, mask


class Database:
    """A committed retrieval database: manifest, tokenizer, segments and validation split."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = Path(directory)
        self.manifest = manifest

    @classmethod
    def open(cls, home: Path | str) -> Database:
        """The database of `home`.

        Raises:
            DatabaseError: there is none, or its manifest or a file is damaged.
        """
        directory = database_directory(Path(home))
        return cls(directory, read_manifest(directory))

    def check_files(self, *paths: str, sizes_only: bool = False) -> None:
        """Compare files with what the manifest says of them; reads them whole, or looks at their sizes only.

        Raises:
            DatabaseError: one is missing or differs.
        """
        for path in paths:
            problem = file_problem(self.directory / path, self.manifest.files[path], sizes_only=sizes_only)
            if problem is not None:
                raise DatabaseError(
                    f"{self.directory / path} {problem}: restore it, or rebuild the database with jobs/index.py"
                )

    def map_files(self) -> None:
        """Open all that is read of chunks, documents and neighbours: then later edits may unlink the files."""
        for store in (*self.segments, *([self.validation] if self.validation else [])):
            store.map_files()

    @property
    def chunk_length(self) -> int:
        return self.manifest.chunk_length

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer.load(self.directory / self.manifest.build / "tokenizer")

    @cached_property
    def segments(self) -> tuple[ChunkStore, ...]:
        return tuple(ChunkStore(self.directory, segment, self.chunk_length) for segment in self.manifest.segments)

    @cached_property
    def validation(self) -> ChunkStore | None:
        if self.manifest.validation is None:
            return None
        return ChunkStore(self.directory, self.manifest.validation, self.chunk_length)

    @cached_property
    def chunk_id_bases(self) -> np.ndarray:
        """int64 [num_segments], ascending: chunk_id of each segment's first row."""
        return np.array([segment.chunk_id_base for segment in self.manifest.segments], dtype=np.int64)

    @cached_property
    def _segment_sizes(self) -> np.ndarray:
        """int64 [num_segments]: chunks of each segment."""
        return np.array([segment.num_chunks for segment in self.manifest.segments], dtype=np.int64)

    @cached_property
    def deleted(self) -> DeletedDocuments:
        """Documents that are in a segment, but no longer in the database."""
        if self.manifest.deleted is None:
            return DeletedDocuments.none()
        return DeletedDocuments.read(self.directory / self.manifest.deleted)

    def find_document(self, document_id: str) -> tuple[ChunkStore, int] | None:
        """Segment and row of the document with this id; None where the database has none, or no longer."""
        for store in reversed(self.segments):
            for document in store.documents_of(document_id):
                if not self.is_deleted(store.chunk_id_base + store.document_first_row[document]):
                    return store, document
        return None

    def is_deleted(self, chunk_ids: np.ndarray) -> np.ndarray:
        """bool, of the shape of `chunk_ids` (int64): True for chunks of deleted documents."""
        return self.deleted.contain(chunk_ids)

    def locate(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segment and row of chunks: int64, of the shape of `chunk_ids`.

        Both are -1 for what is not in the database: -1, chunks of deleted documents, and chunk_ids
        of before it was compacted.
        """
        chunk_ids = np.asarray(chunk_ids, np.int64)
        if not self.manifest.segments:
            return np.full(chunk_ids.shape, -1), np.full(chunk_ids.shape, -1)
        segment = np.searchsorted(self.chunk_id_bases, chunk_ids, side="right") - 1
        row = chunk_ids - self.chunk_id_bases[segment]
        present = (segment >= 0) & (row < self._segment_sizes[segment]) & ~self.is_deleted(chunk_ids)
        return np.where(present, segment, -1), np.where(present, row, -1)

    def without_deleted(self, chunk_ids: np.ndarray) -> np.ndarray:
        """Neighbours without those that are deleted: the next ones move up, -1 follows.

        Args:
            chunk_ids: int64 [n, K], nearest first, -1 where there is none.
        """
        if not len(self.deleted):
            return chunk_ids
        left = np.where(self.is_deleted(chunk_ids), -1, chunk_ids)
        return np.take_along_axis(left, np.argsort(left < 0, axis=1, kind="stable"), axis=1)

    @cached_property
    def live_runs(self) -> np.ndarray:
        """int64 [n, 2], ascending: first and last chunk_id of every unbroken run of live chunks."""
        sizes, deleted = self._segment_sizes, self.deleted.ranges
        # A run starts with a segment or behind a deleted document, and ends with a segment or before one.
        first = np.sort(np.concatenate([self.chunk_id_bases, deleted[:, 1] + 1]))
        last = np.sort(np.concatenate([self.chunk_id_bases + sizes - 1, deleted[:, 0] - 1]))
        return np.stack([first, last], axis=1)[first <= last]

    def neighbour_tokens(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N, F] of chunks of any segment.

        Args:
            chunk_ids: int64 of any shape; -1 where there is no neighbour.

        Returns:
            tokens int64 [..., 2m] and mask bool [..., 2m]. Nothing is shown of a deleted document.
        """
        flat = np.asarray(chunk_ids, dtype=np.int64).reshape(-1)
        width = 2 * self.chunk_length
        tokens, mask = np.zeros((len(flat), width), np.int64), np.zeros((len(flat), width), bool)
        segment_of, row_of = self.locate(flat)
        for segment in np.unique(segment_of[segment_of >= 0]):
            chosen = np.flatnonzero(segment_of == segment)
            tokens[chosen], mask[chosen] = self.segments[segment].neighbour_tokens(row_of[chosen])
        shape = (*np.shape(chunk_ids), width)
        return tokens.reshape(shape), mask.reshape(shape)
