"""A Retriever over one database, wherever its shards are."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from retro_ray.config import RerankMethod, RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.errors import RetrievalError
from retro_ray.retrieval.asking import Asker, Shards
from retro_ray.retrieval.following import FollowedManifest
from retro_ray.retrieval.lookup import look_up
from retro_ray.retrieval.rerank import Reranker, pad_chunks
from retro_ray.retrieval.retriever import NeighbourSet


class DatabaseRetriever:
    """Searches, reranks, and reads what was found. Any number of threads may use it.

    Args:
        follow: the database's manifest.
        shards: reaches its shards.
        config: how to search.

    Raises:
        DatabaseError: there is no database.
    """

    def __init__(self, follow: FollowedManifest, shards: Shards, config: RetrievalConfig) -> None:
        self._asker = Asker(follow, shards, config.timeout_s)
        self._config = config
        self._rerankers: dict[tuple[str | None, RerankMethod, int], Reranker | None] = {}
        self._lock = threading.Lock()

    @property
    def database(self) -> Database:
        """As it is now."""
        return self._asker.database

    def search(
        self,
        queries: np.ndarray,
        k: int,
        chunks: Sequence[Sequence[int]] | None = None,
        rerank: RerankMethod | None = None,
    ) -> NeighbourSet:
        reranker = None if chunks is None else self._reranker(self._asker.database, rerank)
        if reranker is None or chunks is None:
            found = self._asker.search(queries, k)
            return look_up(found.database, found.distances, found.chunk_ids, found.missing_shards)
        found = self._asker.search(queries, max(k, reranker.num_candidates))
        distances, chunk_ids = reranker.order(found.database, pad_chunks(chunks), found.distances, found.chunk_ids, k)
        return look_up(found.database, distances, chunk_ids, found.missing_shards)

    def search_ids(
        self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        found = self._asker.search(queries, k, excluded_ids)
        if found.missing_shards:
            # There is no place in this answer to say so.
            raise RetrievalError(
                f"shards {list(found.missing_shards)} of the database in {found.database.directory} did not answer: "
                "set the policy to wait"
            )
        return found.distances, found.chunk_ids

    def _reranker(self, database: Database, method: RerankMethod | None) -> Reranker | None:
        """By what was asked for, else by this retriever's setting, else as the database's own neighbours."""
        manifest = database.manifest
        method = method or self._config.rerank or manifest.rerank
        num_candidates = self._config.num_rerank_candidates or manifest.num_rerank_candidates
        key = (manifest.token_statistics, method, num_candidates)
        with self._lock:
            if key not in self._rerankers:
                self._rerankers[key] = Reranker.of(database, method, num_candidates)
            return self._rerankers[key]
