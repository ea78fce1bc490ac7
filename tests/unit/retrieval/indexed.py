"""Tiny databases with index files."""

from __future__ import annotations

from typing import Any

import numpy as np

from retro_ray.database.format import FileRecord, Manifest, file_record, write_manifest
from retro_ray.database.store import Database
from retro_ray.index.build import index_segment, train_index, write_index


def with_indexes(database: Database, **changes: Any) -> Database:
    """The database with the indexes that its manifest asks for, committed; and with fields of its manifest replaced."""
    manifest = Manifest(**{**vars(database.manifest), **changes})
    files: dict[str, FileRecord] = dict(manifest.files)
    keys = [store.keys for store in database.segments]
    paths = [segment.keys for segment in manifest.segments]
    codec = None
    if manifest.index.has_codec:
        codec = f"{manifest.build}/codec.faiss"
        write_index(train_index(manifest.index, manifest.key_dim, np.concatenate(keys)), database.directory / codec)
        paths.append(codec)
        manifest = Manifest(**{**vars(manifest), "codec": codec})
    trained = None if codec is None else database.directory / codec
    for segment in manifest.segments:
        index = segment.index(manifest.index)
        if index_segment(manifest.index, trained, database.directory / segment.keys, database.directory / index):
            paths.append(index)
    files |= {path: file_record(database.directory / path) for path in paths}
    manifest = Manifest(**{**vars(manifest), "files": files})
    write_manifest(database.directory, manifest)
    return Database(database.directory, manifest)
