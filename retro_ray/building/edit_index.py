"""What makes the segments of an edit searchable: their indexes and neighbours, made in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from retro_ray.building.add_segment import PROGRESS_DELAY_S
from retro_ray.building.transaction import Transaction
from retro_ray.config import RetrievalConfig
from retro_ray.database.format import Partition
from retro_ray.database.store import ChunkStore
from retro_ray.index.build import index_segment
from retro_ray.index.spec import IndexSpec
from retro_ray.progress import progress_bar
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import write_neighbours


def make_searchable(edit: Transaction, segment: Partition, spec: IndexSpec | None = None) -> None:
    """Write a segment's index, if it is to have one: as `spec` asks; default: that of the database."""
    spec, codec = spec or edit.manifest.index, edit.manifest.codec
    trained = None if codec is None else edit.directory / codec
    if index_segment(spec, trained, edit.directory / segment.keys, edit.directory / segment.index(spec)):
        edit.add_files(segment.index(spec))


def store_neighbours(edit: Transaction, partitions: Sequence[Partition]) -> None:
    """Search the neighbours of all chunks of some partitions in the database as the edit leaves it.

    The manifest then says where they are, and of which generation.
    """
    database = edit.database()
    retriever = LocalRetriever.open(database, RetrievalConfig(mmap=True), pinned=True)
    searched: dict[str, Partition] = {}
    total = sum(partition.num_chunks for partition in partitions)
    with progress_bar(total, "neighbours", " chunks", delay_s=PROGRESS_DELAY_S) as bar:
        for partition in partitions:
            placed = dataclasses.replace(partition, neighbours_generation=edit.generation)
            if not partition.folder.startswith(f"{edit.folder}/"):  # its files are another generation's, and stay
                placed = dataclasses.replace(placed, neighbours_folder=f"{edit.folder}/{partition.name}")
                edit.drop_files(partition.neighbours)
            path = edit.directory / placed.neighbours
            path.parent.mkdir(exist_ok=True)
            store = ChunkStore(edit.directory, partition, database.chunk_length)
            write_neighbours(store, retriever, edit.manifest.num_neighbours, path, database, bar.update)
            edit.add_files(placed.neighbours)
            searched[partition.name] = placed
    manifest = edit.manifest
    validation = manifest.validation and searched.get(manifest.validation.name, manifest.validation)
    segments = tuple(searched.get(segment.name, segment) for segment in manifest.segments)
    edit.replace(segments=segments, validation=validation)
