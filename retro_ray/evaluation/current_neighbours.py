"""Neighbours of the validation split in the database as it is now.

Those that a build stored with it are of that build. What was added since is in none of them, so that
bits per byte would not show what the database has learned: they are searched again, and kept in

    HOME/cache/validation-neighbours/<version>-<generation>.arrow

until a later generation is evaluated.
"""

from __future__ import annotations

import logging
from pathlib import Path

from retro_ray.config import RetrievalConfig
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import DatabaseError
from retro_ray.evaluation.own_text import ScoredText
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import write_neighbours
from retro_ray.training.windows import require_stored_neighbours

logger = logging.getLogger(__name__)


def current_neighbours(database: Database, store: ChunkStore) -> Path:
    """File of the neighbours of every chunk of the validation split, searched in this very generation.

    Args:
        database: to search in.
        store: its validation split.
    """
    manifest, partition = database.manifest, store.partition
    if partition.neighbours_generation == manifest.generation:
        return database.directory / partition.neighbours
    folder = database.directory.parent / "cache" / "validation-neighbours"
    path = folder / f"{manifest.version}-{manifest.generation:08d}.arrow"
    if not path.exists():
        logger.info(
            "the neighbours of the validation split are of generation %d of the database: searching them again in "
            "generation %d, which holds what was added since",
            partition.neighbours_generation,
            manifest.generation,
        )
        folder.mkdir(parents=True, exist_ok=True)
        retriever = LocalRetriever.open(database, RetrievalConfig(mmap=True), pinned=True)
        write_neighbours(store, retriever, manifest.num_neighbours, path, database)
        for older in folder.iterdir():
            if older != path:
                older.unlink(missing_ok=True)
    return path


def validation_text(database: Database, num_neighbours: int) -> ScoredText:
    """The validation split, to be scored with so many of its neighbours in this very generation.

    Raises:
        DatabaseError: the database has no validation split.
        ConfigError: it stores fewer neighbours per chunk.
    """
    store = database.validation
    if store is None:
        raise DatabaseError(
            f"the database in {database.directory} has no validation split: build it with a larger --validation-share, "
            "or from more documents"
        )
    require_stored_neighbours(database.manifest, num_neighbours)
    return ScoredText(database.directory, store.partition, current_neighbours(database, store))
