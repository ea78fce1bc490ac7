"""One edit of a database: under its lock, in a folder of its own, ended by one commit or by nothing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retro_ray.database.commit import (
    checksums,
    commit,
    committed,
    database_lock,
    next_generation,
    remove_leftovers,
)
from retro_ray.database.format import DELETED_SCHEMA, Manifest, Partition, read_manifest
from retro_ray.database.store import ChunkStore, Database


class Transaction:
    """What an edit reads and where it writes; made by `transaction`.

    `manifest` is the database as the edit leaves it, and grows as the edit goes on; nothing of it
    holds before `commit`.
    """

    def __init__(self, directory: Path, base: Manifest) -> None:
        self.directory = directory
        self.base = base
        self.generation = next_generation(base)
        self.folder = f"edit-{self.generation:08d}"
        self.manifest = dataclasses.replace(base, generation=self.generation)
        self.is_committed = False
        self._written: set[str] = set()

    def replace(self, **changes: Any) -> None:
        """Change fields of the manifest that the edit will leave."""
        self.manifest = dataclasses.replace(self.manifest, **changes)

    def database(self) -> Database:
        """The database as the edit leaves it, as far as it has come."""
        return Database(self.directory, self.manifest)

    def add_files(self, *paths: str) -> None:
        """Take files that the edit has written into the manifest, with their checksums."""
        self._written.update(paths)
        self.replace(files=dict(sorted({**self.manifest.files, **checksums(self.directory, paths)}.items())))

    def drop_files(self, *paths: str) -> None:
        """Take files out of the manifest; on the disk they stay until readers had time to go on."""
        dropped = set(paths)
        self._written -= dropped
        self.replace(files={path: record for path, record in self.manifest.files.items() if path not in dropped})

    def delete(self, documents: Sequence[tuple[ChunkStore, int]]) -> None:
        """Delete documents, given by segment and row: from here on `database()` is without them."""
        rows, tokens, num_bytes = [], 0, 0
        for store, document in documents:
            first, stop = store.document_rows(document)
            bounds = {"first_chunk_id": store.chunk_id_base + first, "last_chunk_id": store.chunk_id_base + stop - 1}
            rows.append({"id": store.document_ref(document).id, **bounds})
            tokens += int(store.lengths(np.arange(first, stop)).sum())
            num_bytes += int(store.document_num_bytes[document])
        deleted = self.database().deleted.with_more(pa.Table.from_pylist(rows, schema=DELETED_SCHEMA))
        path = f"{self.folder}/deleted.arrow"
        deleted.write(self.directory / path)
        if self.manifest.deleted is not None:
            self.drop_files(self.manifest.deleted)
        self.add_files(path)
        self.replace(
            deleted=path,
            num_deleted_documents=self.manifest.num_deleted_documents + len(documents),
            num_deleted_chunks=self.manifest.num_deleted_chunks
            + sum(row["last_chunk_id"] - row["first_chunk_id"] + 1 for row in rows),
            num_deleted_tokens=self.manifest.num_deleted_tokens + tokens,
            num_deleted_bytes=self.manifest.num_deleted_bytes + num_bytes,
        )

    def smallest_shard(self, without: Sequence[Partition] = ()) -> int:
        """The shard that has the fewest chunks, some segments not counted."""
        segments = [segment for segment in self.manifest.segments if segment not in without]
        num_chunks = np.bincount(
            [segment.shard for segment in segments],
            weights=[segment.num_chunks for segment in segments],
            minlength=self.manifest.num_shards,
        )
        return int(num_chunks.argmin())

    def set_segments(self, segments: Sequence[Partition]) -> None:
        """Replace the segments; chunk_ids behind the last one are free."""
        last = segments[-1]
        self.replace(segments=tuple(segments), next_chunk_id=last.chunk_id_base + last.num_chunks)

    def commit(self) -> Manifest:
        """Make the manifest the database.

        Raises:
            DatabaseError: the database is no longer the one that the edit began with.
        """
        manifest = commit(self.directory, self.manifest, self.base, self._written)
        self.is_committed = True
        return manifest


@contextmanager
def transaction(directory: Path, purpose: str) -> Iterator[Transaction]:
    """An edit of the database in `directory`; what it has written is removed unless it comes to commit.

    Args:
        directory: of the database.
        purpose: "adding documents", ...; told to others who want to edit meanwhile.

    Raises:
        DatabaseError: there is no database, or something else changes it.
    """
    read_manifest(directory)  # before anything is created where no database is
    with database_lock(directory, purpose):
        edit = Transaction(directory, read_manifest(directory))
        folder = directory / edit.folder
        shutil.rmtree(folder, ignore_errors=True)  # of an edit that was killed
        folder.mkdir()
        try:
            yield edit
        finally:
            now = committed(directory)  # what was committed last, even if an error came right behind it
            if now is not None and now.generation < edit.generation:
                shutil.rmtree(folder, ignore_errors=True)
        if edit.is_committed:
            remove_leftovers(directory, [read_manifest(directory), edit.base], keep_unfinished=True)
