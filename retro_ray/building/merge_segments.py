"""Merging the segments that additions leave, so that a thousand small additions leave some ten segments.

A search asks every segment. When what was added last is at least half as large as the segment before
it, both become one; so the segments that were added at least halve in size from one to the next, and
a chunk is copied at most once each time its segment doubles. Only neighbours in the order of chunk_ids
are merged: every chunk keeps its chunk_id, and nothing is embedded or searched again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pyarrow as pa

from retro_ray.building.copy_documents import DocumentRun, copy_documents
from retro_ray.building.edit_index import make_searchable
from retro_ray.building.transaction import Transaction
from retro_ray.database.arrow_rows import fixed_size_lists, write_rows
from retro_ray.database.format import Partition, neighbours_schema
from retro_ray.database.store import ChunkStore

ADDED = "added-"
"""Names of the segments that were added begin with this."""


def merge_added(edit: Transaction) -> None:
    """Merge the last segment with those before it that it has caught up with, if there are any."""
    parts = edit.manifest.segments[-num_to_merge(edit.manifest.segments) :]
    if len(parts) == 1:
        return
    stores = [ChunkStore(edit.directory, part, edit.base.chunk_length) for part in parts]
    name = f"{ADDED}{edit.generation:08d}"
    folder = edit.directory / edit.folder / "merged"
    merged = dataclasses.replace(
        copy_documents([DocumentRun.whole(store) for store in stores], folder, edit.base),
        name=name,
        shard=edit.smallest_shard(without=parts),
        chunk_id_base=parts[0].chunk_id_base,
        neighbours_generation=min(part.neighbours_generation for part in parts),
    )
    schema = neighbours_schema(edit.base.num_neighbours)
    write_rows(edit.directory / merged.neighbours, schema, _neighbours(stores, schema))
    edit.drop_files(*(path for part in parts for path in part.paths(edit.base.index)))
    edit.add_files(merged.chunks, merged.documents, merged.ids, merged.keys, merged.neighbours)
    make_searchable(edit, merged)
    edit.set_segments([*edit.manifest.segments[: -len(parts)], merged])


def num_to_merge(segments: Sequence[Partition]) -> int:
    """How many of the last segments are to become one; 1: none."""
    count, num_chunks = 1, segments[-1].num_chunks
    for before in reversed(segments[:-1]):
        adjacent = before.chunk_id_base + before.num_chunks == segments[-count].chunk_id_base
        if not (before.name.startswith(ADDED) and adjacent and before.num_chunks < 2 * num_chunks):
            break
        count, num_chunks = count + 1, num_chunks + before.num_chunks
    return count


def _neighbours(stores: Sequence[ChunkStore], schema: pa.Schema) -> Iterator[pa.Table]:
    for store in stores:
        for rows in DocumentRun.whole(store).row_blocks():
            columns = [
                fixed_size_lists(store.neighbours.gather(field.name, rows), field.type.value_type) for field in schema
            ]
            yield pa.Table.from_arrays(columns, schema=schema)
