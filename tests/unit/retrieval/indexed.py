"""Tiny databases with index files."""

from __future__ import annotations

from typing import Any

from retro_ray.database.format import FileRecord, Manifest, file_record, write_manifest
from retro_ray.database.store import Database
from retro_ray.index.build import fill_index, train_index, write_index


def with_indexes(database: Database, **changes: Any) -> Database:
    """The database with exact indexes of its keys, committed; and with fields of its manifest replaced."""
    files: dict[str, FileRecord] = dict(database.manifest.files)
    for shard, store in zip(database.manifest.segments, database.segments, strict=True):
        keys = store.keys
        path = database.directory / shard.index
        write_index(fill_index(train_index(database.manifest.index, keys.shape[1], keys), [keys]), path)
        files[shard.index] = file_record(path)
    manifest = Manifest(**{**vars(database.manifest), "files": files, **changes})
    write_manifest(database.directory, manifest)
    return Database(database.directory, manifest)
