"""Opening a database for text queries: through the shared shard actors where Ray runs, else in this process."""

from __future__ import annotations

import ray

from retro_ray.config import RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.ray_session import connect_if_running
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import ChunkRetriever
from retro_ray.retrieval.sharded import ShardedRetriever


def open_retriever(database: Database, config: RetrievalConfig | None = None) -> ChunkRetriever:
    """A ChunkRetriever for a command: it does not start Ray, which takes longer than a few searches.

    Raises:
        MismatchError: the embedder here is not the one the database was built with.
    """
    running = ray.is_initialized() or connect_if_running()
    retriever = ShardedRetriever(database, config) if running else LocalRetriever.open(database, config)
    return ChunkRetriever.open(database, retriever)
