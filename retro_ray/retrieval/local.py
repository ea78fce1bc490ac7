"""Retrieval inside one process, without Ray: for tests, tools and small databases."""

from __future__ import annotations

import math

import faiss

from retro_ray.config import RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.retrieval.answering import ServedShard
from retro_ray.retrieval.database_retriever import DatabaseRetriever
from retro_ray.retrieval.following import FollowedManifest
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest

_MIN_QUERIES_PER_REQUEST, _MAX_QUERIES_PER_REQUEST = 64, 1024


class LocalShards:
    """All segments in this process, as one shard."""

    are_elsewhere = False

    def __init__(self, served: ServedShard) -> None:
        self._served = served

    @property
    def requests_at_a_time(self) -> int:
        """As many as FAISS has threads: each works on requests of its own, from preparing to merging."""
        return faiss.omp_get_max_threads()

    def num_requests(self, num_queries: int) -> int:
        num_threads = max(1, min(self.requests_at_a_time, num_queries // _MIN_QUERIES_PER_REQUEST))
        return num_threads * max(1, math.ceil(num_queries / (num_threads * _MAX_QUERIES_PER_REQUEST)))

    def ask(self, request: CandidateRequest, num_shards: int) -> tuple[list[CandidateAnswer], tuple[int, ...]]:
        return self._served.answer([request]), ()


class LocalRetriever(DatabaseRetriever):
    """A Retriever over shards in this process. It follows the database: a commit shows in the next search."""

    @classmethod
    def open(cls, database: Database, config: RetrievalConfig | None = None, *, pinned: bool = False) -> LocalRetriever:
        """A retriever for `database`.

        Args:
            database: whose segments to load.
            config: how; replicas and policy mean nothing here.
            pinned: search this very state, which may not be committed yet, and no later one.

        Raises:
            DatabaseError: a file is missing or damaged; names it.
        """
        config = config or RetrievalConfig()
        manifest = database.manifest if pinned else None
        served = ServedShard(database.directory, pinned=manifest, mmap=config.mmap)
        return cls(FollowedManifest(database.directory, manifest), LocalShards(served), config)
