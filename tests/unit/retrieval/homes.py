"""Homes with small databases whose keys, documents, segments and deletions a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retro_ray.database.deleted import DeletedDocuments
from retro_ray.database.format import DELETED_SCHEMA, FileRecord, Manifest, Partition, file_record, write_manifest
from retro_ray.database.store import ChunkStore, Database
from retro_ray.index.spec import IndexSpec
from tests.unit.database.stores import M, write_store

FLAT = IndexSpec(factory="Flat")


@dataclass
class Home:
    """A database as the generations of it are committed, one after another."""

    directory: Path
    stores: list[ChunkStore]
    manifest: Manifest

    @property
    def database(self) -> Database:
        return Database(self.directory, self.manifest)

    def commit(self, **changes: Any) -> Database:
        """One more generation, with fields of the manifest replaced."""
        self.manifest = replace(self.manifest, generation=self.manifest.generation + 1, **changes)
        write_manifest(self.directory, self.manifest)
        return self.database

    def delete(self, documents: Sequence[tuple[int, int]]) -> Database:
        """Commit the deletion of documents, given by segment and row; all that are deleted."""
        rows = []
        for segment, document in sorted(documents):
            store = self.stores[segment]
            first, stop = (row + store.chunk_id_base for row in store.document_rows(document))
            rows.append({"id": store.document_ref(document).id, "first_chunk_id": first, "last_chunk_id": stop - 1})
        path = f"deleted-{self.manifest.generation + 1}.arrow"
        DeletedDocuments(pa.Table.from_pylist(rows, schema=DELETED_SCHEMA)).write(self.directory / path)
        num_chunks = sum(row["last_chunk_id"] - row["first_chunk_id"] + 1 for row in rows)
        files = {**self.manifest.files, path: file_record(self.directory / path)}
        return self.commit(deleted=path, num_deleted_documents=len(rows), num_deleted_chunks=num_chunks, files=files)

    def show(self, num_segments: int) -> Database:
        """Commit the first segments alone: the others come with a later generation."""
        partitions = tuple(store.partition for store in self.stores[:num_segments])
        return self.commit(segments=partitions, next_chunk_id=sum(part.num_chunks for part in partitions))


def write_home(
    directory: Path, documents: Sequence[list[int]], keys: np.ndarray, cuts: Sequence[int], shards: Sequence[int]
) -> Home:
    """Documents as token ids, divided into segments before the documents in `cuts`.

    Args:
        directory: of the database; exists.
        documents: token ids of each.
        keys: float32 [n, D], of all their chunks.
        cuts: where further segments begin, ascending.
        shards: of each segment; some of 0..max may have none.
    """
    bounds = [0, *cuts, len(documents)]
    stores: list[ChunkStore] = []
    files: dict[str, FileRecord] = {}
    base = 0
    for number, (start, stop) in enumerate(pairwise(bounds)):
        own_documents = list(documents[start:stop])
        num_chunks = sum(-(-len(tokens) // M) for tokens in own_documents)
        store = write_store(
            directory,
            own_documents,
            name=f"segment-{number}",
            base=base,
            keys=keys[base : base + num_chunks],
            first_document=start,
        )
        part = replace(store.partition, shard=shards[number])
        stores.append(ChunkStore(directory, part, M))
        files |= {path: file_record(directory / path) for path in (part.chunks, part.documents, part.keys)}
        base += num_chunks
    segments: tuple[Partition, ...] = tuple(store.partition for store in stores)
    manifest = Manifest(
        build="build",
        chunk_length=M,
        tokenizer_name="none",
        tokenizer_fingerprint="none",
        vocab_size=300,
        embedder_name="none",
        embedder_fingerprint="none",
        key_dim=keys.shape[1],
        index=FLAT,
        num_neighbours=4,
        num_shards=max(shards) + 1,
        segments=segments,
        validation=None,
        generation=1,
        next_chunk_id=base,
        files=files,
    )
    write_manifest(directory, manifest)
    return Home(directory, stores, manifest)
