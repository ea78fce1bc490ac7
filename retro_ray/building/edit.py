"""Changing a database after it was built: documents added, deleted, replaced; and compacted.

Every edit is one commit (see `transaction`): whoever reads the database sees all of it or nothing.
Adding costs what is added: only the new chunks are embedded, indexed (with the codec that is there, or in a graph of
their own), and given neighbours. What is stored with older chunks stays, but for neighbours that were deleted;
`compact` searches all neighbours again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_ray.building.add_segment import Embedder, embed_segment, write_chunked
from retro_ray.building.compact import compact_segments
from retro_ray.building.edit_index import make_searchable, store_neighbours
from retro_ray.building.index_choice import is_searched_exactly
from retro_ray.building.merge_segments import ADDED, merge_added
from retro_ray.building.transaction import Transaction, transaction
from retro_ray.database.format import Manifest, Partition, database_directory
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import InputError, MismatchError
from retro_ray.text.chunking import ChunkedDocument, chunk_document
from retro_ray.text.corpus import Document

_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """What an edit did."""

    generation: int
    """Of the database that it left."""
    documents_added: int = 0
    documents_deleted: int = 0
    """Those that were replaced among them."""
    documents_unchanged: int = 0
    """Documents of an update that the database has as they are: nothing is done for them."""
    chunks_added: int = 0
    seconds: float
    advice: str | None = None
    """What should be done next, if anything."""


class DatabaseEditor:
    """Edits the database of a home, in this process.

    When a method returns, its effect is on the disk, and every search that begins later sees it.

    Args:
        home: of the database.
        embedder: must be the one that the database was built with; default: that one, loaded when it
            is first needed, and kept.
        announce: called with the database's folder after every commit, so that what serves the
            database need not wait for the next query to load what is new.
    """

    def __init__(
        self, home: Path, *, embedder: Embedder | None = None, announce: Callable[[Path], None] | None = None
    ) -> None:
        self._directory = database_directory(home)
        self._given_embedder = embedder
        self._loaded_embedder: tuple[str, Embedder] | None = None
        self._announce = announce

    def add(self, documents: Iterable[Document]) -> EditReport:
        """Add documents with ids that are not in the database.

        Raises:
            InputError: there are none, or an id is in the database or comes twice.
            DatabaseError: there is no database, or something else changes it.
            MismatchError: the embedder here is not the one that the database was built with.
        """
        return self._put(documents, "adding documents", may_replace=False)

    def update(self, documents: Iterable[Document]) -> EditReport:
        """Put documents in place of those with their ids; add those whose ids are new.

        Documents that are there already, with the same title, source and text, cost next to nothing.

        Raises:
            InputError: there are none, or an id comes twice.
            DatabaseError: there is no database, or something else changes it.
            MismatchError: the embedder here is not the one that the database was built with.
        """
        return self._put(documents, "updating documents", may_replace=True)

    def delete(self, document_ids: Iterable[str]) -> EditReport:
        """Delete documents by their ids: no search returns them, and no reader shows their text.

        Raises:
            InputError: none is named, or an id is not in the database.
            DatabaseError: there is no database, or something else changes it.
        """
        start = time.perf_counter()
        ids = list(dict.fromkeys(document_ids))
        if not ids:
            raise InputError("no documents to delete: name them with --document")
        with self._editing("deleting documents") as edit:
            database = edit.database()
            found = {name: database.find_document(name) for name in ids}
            if unknown := [name for name, place in found.items() if place is None]:
                raise InputError(f"not in the database: {_named(unknown)}; nothing was deleted")
            edit.delete([place for place in found.values() if place is not None])
            manifest = edit.commit()
        return EditReport(
            generation=manifest.generation, documents_deleted=len(ids), seconds=time.perf_counter() - start
        )

    def compact(self, num_shards: int | None = None) -> EditReport:
        """Rewrite the database without what is deleted, with one segment per shard and a new index.

        Nothing is embedded. All chunks get new chunk_ids, and all neighbours are searched again.

        Args:
            num_shards: default: as many as there are.

        Raises:
            DatabaseError: there is no database or nothing left in it, or something else changes it.
        """
        start = time.perf_counter()
        with self._editing("compacting") as edit:
            compact_segments(edit, num_shards or edit.base.num_shards)
            manifest = edit.commit()
        return EditReport(generation=manifest.generation, seconds=time.perf_counter() - start)

    def _put(self, documents: Iterable[Document], purpose: str, *, may_replace: bool) -> EditReport:
        start = time.perf_counter()
        with self._editing(purpose) as edit:
            base, embedder = edit.base, self._embedder(edit.base)
            chosen = _Chosen(documents, edit.database(), may_replace=may_replace)
            folder = self._directory / edit.folder / "added"
            writer = write_chunked(folder, chosen, base.chunk_length, base.vocab_size)
            if writer.num_documents:
                segment = writer.partition(f"{ADDED}{edit.generation:08d}", base.next_chunk_id, edit.smallest_shard())
                base = self._put_segment(edit, segment, chosen, embedder)
            elif not chosen.num_unchanged:
                raise InputError("no documents to add: name files or folders that hold some")
        return EditReport(
            generation=base.generation,
            documents_added=writer.num_documents,
            documents_deleted=len(chosen.replaced),
            documents_unchanged=chosen.num_unchanged,
            chunks_added=writer.num_chunks,
            seconds=time.perf_counter() - start,
            advice=_advice(base),
        )

    def _put_segment(self, edit: Transaction, segment: Partition, chosen: _Chosen, embedder: Embedder) -> Manifest:
        """Make a segment of documents that are chunked part of the database, in place of those that they replace."""
        embed_segment(self._directory, segment, edit.base.chunk_length, chosen.tokenizer, embedder)
        edit.add_files(segment.chunks, segment.documents, segment.ids, segment.keys)
        make_searchable(edit, segment)
        edit.set_segments([*edit.base.segments, segment])
        if chosen.replaced:
            edit.delete(chosen.replaced)
        store_neighbours(edit, [segment])
        merge_added(edit)
        return edit.commit()

    def _embedder(self, manifest: Manifest) -> Embedder:
        """The embedder that the database was built with."""
        embedder = self._given_embedder or self._load_embedder(manifest.embedder_name)
        if embedder.fingerprint != manifest.embedder_fingerprint:
            raise MismatchError(
                f"the embedder {manifest.embedder_name} here has fingerprint {embedder.fingerprint}, the database in "
                f"{self._directory} was built with {manifest.embedder_fingerprint}: install that one, or rebuild the "
                "database with jobs/index.py"
            )
        return embedder

    def _load_embedder(self, name: str) -> Embedder:
        if self._loaded_embedder is None or self._loaded_embedder[0] != name:
            from retro_ray.embedding import ChunkEmbedder  # torch: deletions and --help do without it

            self._loaded_embedder = name, ChunkEmbedder(name)
        return self._loaded_embedder[1]

    @contextmanager
    def _editing(self, purpose: str) -> Iterator[Transaction]:
        with transaction(self._directory, purpose) as edit:
            yield edit
        if self._announce is not None:
            self._announce(self._directory)


class _Chosen:
    """The documents of an edit as chunks, one by one: each with an id of its own, and new or changed."""

    def __init__(self, documents: Iterable[Document], database: Database, *, may_replace: bool) -> None:
        self._documents, self._database, self._may_replace = documents, database, may_replace
        self.tokenizer = database.tokenizer
        self.replaced: list[tuple[ChunkStore, int]] = []
        """Segment and row of what they replace."""
        self.num_unchanged = 0
        """Documents that the database has as they are."""

    def __iter__(self) -> Iterator[ChunkedDocument]:
        seen: set[str] = set()
        for document in self._documents:
            if document.id in seen:
                raise InputError(f"two documents have the id {document.id!r}: make the ids unique; nothing was changed")
            seen.add(document.id)
            chunked = chunk_document(document, self.tokenizer, self._database.chunk_length)
            place = self._database.find_document(document.id)
            if place is not None:
                if not self._may_replace:
                    raise InputError(
                        f"the document {document.id!r} is in the database already: replace it with update; nothing "
                        "was added"
                    )
                if _is_same(chunked, *place):
                    self.num_unchanged += 1
                    continue
                self.replaced.append(place)
            yield chunked


def _is_same(document: ChunkedDocument, store: ChunkStore, row: int) -> bool:
    """Whether a document stands in a segment with the same title, source and text."""
    ref = store.document_ref(row)
    if (document.title, document.source) != (ref.title, ref.source):
        return False
    rows = np.arange(*store.document_rows(row))
    return np.array_equal(store.tokens(rows), document.tokens) and np.array_equal(store.lengths(rows), document.lengths)


def _advice(manifest: Manifest) -> str | None:
    target_recall = manifest.settings.get("database", {}).get("target_recall", 0.95)
    chosen_by_size = manifest.index.factory == "Flat" and not manifest.index_curve
    if chosen_by_size and not is_searched_exactly(manifest.num_live_chunks, manifest.key_dim, target_recall):
        return (
            f"all {manifest.num_live_chunks:,} chunks are compared with every query, as when there were fewer: "
            "python -m retro_ray compact chooses an index for so many"
        )
    return None


def _named(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
