"""Rewriting a database without its deleted documents: one segment per shard, and everything found anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from retro_ray.building.copy_documents import DocumentRun, copy_documents
from retro_ray.building.edit_index import make_searchable, store_neighbours
from retro_ray.building.index_choice import IndexAims, IndexChoice, choose_search, is_searched_exactly, train_codec
from retro_ray.building.transaction import Transaction
from retro_ray.database.format import Partition
from retro_ray.database.split import shard_name
from retro_ray.database.store import ChunkStore, Database
from retro_ray.database.token_statistics import num_holding, write_token_statistics
from retro_ray.errors import DatabaseError
from retro_ray.index.spec import IndexSpec

_SEED = 0


def compact_segments(edit: Transaction, num_shards: int) -> None:
    """Put the live documents into new segments, about equally many chunks in each of `num_shards` shards.

    Raises:
        DatabaseError: no document is left.
    """
    base, database = edit.base, edit.database()
    runs = _assign(database, num_shards)
    if not runs:
        raise DatabaseError(
            f"every document of the database in {edit.directory} is deleted: add some before compacting it"
        )
    segments, next_chunk_id = [], base.next_chunk_id
    for shard, shard_runs in enumerate(runs):
        copied = copy_documents(shard_runs, edit.directory / edit.folder / shard_name(shard), base)
        segment = dataclasses.replace(copied, shard=shard, chunk_id_base=next_chunk_id)
        segments.append(segment)
        next_chunk_id += segment.num_chunks
    edit.drop_files(*(path for segment in base.segments for path in segment.paths(base.index)))
    edit.drop_files(*(path for path in (base.codec, base.deleted) if path is not None))
    edit.set_segments(segments)
    edit.replace(
        num_shards=len(segments),
        deleted=None,
        num_deleted_documents=0,
        num_deleted_chunks=0,
        num_deleted_tokens=0,
        num_deleted_bytes=0,
    )
    for segment in segments:
        edit.add_files(segment.chunks, segment.documents, segment.ids, segment.keys)
    _count_tokens(edit, segments)
    _index(edit, segments)
    store_neighbours(edit, [*segments, *([base.validation] if base.validation else [])])


def _count_tokens(edit: Transaction, segments: Sequence[Partition]) -> None:
    """What reranking needs to know of the words that are left."""
    stores = [ChunkStore(edit.directory, segment, edit.base.chunk_length) for segment in segments]
    path = f"{edit.folder}/token_statistics.npy"
    holding = num_holding(stores, edit.base.vocab_size)
    write_token_statistics(edit.directory / path, holding, sum(segment.num_chunks for segment in segments))
    if edit.base.token_statistics is not None:
        edit.drop_files(edit.base.token_statistics)
    edit.add_files(path)
    edit.replace(token_statistics=path)


def _assign(database: Database, num_shards: int) -> list[list[DocumentRun]]:
    """Live documents in their order, cut into shards of about equally many chunks; none is empty."""
    live = [
        np.flatnonzero(~database.is_deleted(store.chunk_id_base + store.document_first_row))
        for store in database.segments
    ]
    counts = [store.document_num_chunks[documents] for store, documents in zip(database.segments, live, strict=True)]
    total, before = sum(int(count.sum()) for count in counts), 0
    shards: dict[int, list[DocumentRun]] = {}
    for store, documents, count in zip(database.segments, live, counts, strict=True):
        start = before + np.cumsum(count) - count
        shard_of = start * num_shards // max(1, total)
        for shard in np.unique(shard_of):
            shards.setdefault(int(shard), []).append(DocumentRun(store, documents[shard_of == shard]))
        before += int(count.sum())
    return [shards[shard] for shard in sorted(shards)]


def _index(edit: Transaction, segments: Sequence[Partition]) -> None:
    """Choose the index anew, train its codec on keys of all shards, and index them."""
    base, settings = edit.base, edit.base.settings.get("database", {})
    aims = IndexAims(settings.get("target_recall", 0.95), settings.get("bytes_per_chunk"), _SEED)
    if is_searched_exactly(sum(segment.num_chunks for segment in segments), base.key_dim, aims.target_recall):
        edit.replace(index=IndexSpec(factory="Flat"), index_curve=(), codec=None)
        return
    codec = f"{edit.folder}/codec.faiss"
    common = (edit.directory, segments, base.validation, aims, edit.directory / codec)
    family: IndexChoice = train_codec(*common)
    edit.replace(codec=codec if family.spec.has_codec else None)
    if edit.manifest.codec is not None:
        edit.add_files(codec)
    for segment in segments:
        make_searchable(edit, segment, family.spec)
    choice = choose_search(*common, family)
    edit.replace(index=choice.spec, index_curve=choice.curve)
