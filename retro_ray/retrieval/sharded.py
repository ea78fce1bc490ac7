"""A Retriever over shard actors: in parallel, over replicas, and never silently incomplete."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import ray

from retro_ray.config import RetrievalConfig
from retro_ray.database.format import database_directory
from retro_ray.database.store import Database
from retro_ray.retrieval.database_retriever import DatabaseRetriever
from retro_ray.retrieval.failover import FailoverClient
from retro_ray.retrieval.following import FollowedManifest
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest
from retro_ray.retrieval.ray_transport import RayTransport
from retro_ray.retrieval.wire import MAX_BYTES, request_to_bytes

_QUERIES_PER_REQUEST = 2048
"""At most. Smaller ones, and their answers, cost more time by themselves than they save by being worked on side by
side."""


class ShardedRetriever(DatabaseRetriever):
    """Searches a database through the actors of its shards, starting those that do not run.

    It follows the database: a commit shows in the next search. Any number of threads may use it.

    Args:
        database: or the home that it is in.
        config: replicas, timeout, policy, reranking.
        pinned: search this very state, which may not be committed yet, through actors of its own.

    Raises:
        DatabaseError: there is no database.
    """

    def __init__(
        self, database: Database | Path | str, config: RetrievalConfig | None = None, *, pinned: bool = False
    ) -> None:
        config = config or RetrievalConfig()
        if isinstance(database, Database):
            directory, manifest = database.directory.absolute(), database.manifest if pinned else None
        else:
            directory, manifest = database_directory(Path(database).absolute()), None
        follow = FollowedManifest(directory, manifest)
        self._transport = RayTransport(follow, config, manifest)
        self._database_directory = directory
        self._shards = RayShards(self._transport, config, directory)
        super().__init__(follow, self._shards, config)
        self._transport.start_all()

    def wait_until_ready(self) -> None:
        """Returns once every shard is loaded, whatever the policy.

        Raises:
            RetrievalError: a shard cannot be loaded.
        """
        config = RetrievalConfig(timeout_s=self._config.timeout_s, num_replicas=self._config.num_replicas)
        RayShards(self._transport, config, self._database_directory).ask(None, self.database.manifest.num_shards)


class RayShards:
    """Asks shard actors."""

    requests_at_a_time = 3
    """One is prepared, and one merged, while the shards work on another."""
    are_elsewhere = True

    def __init__(self, transport: RayTransport, config: RetrievalConfig, directory: Path) -> None:
        self._client = FailoverClient(
            transport,
            num_replicas=config.num_replicas,
            timeout_s=config.timeout_s,
            policy=config.policy,
            database=str(directory),
            first_replica=os.getpid(),
        )

    def num_requests(self, num_queries: int) -> int:
        return max(1, math.ceil(num_queries / _QUERIES_PER_REQUEST))

    def ask(
        self, request: CandidateRequest | None, num_shards: int
    ) -> tuple[Sequence[CandidateAnswer], tuple[int, ...]]:
        """As Shards.ask; without a request, whether the shards are loaded."""
        question = self._client.begin(None if request is None else _as_sent(request), num_shards)
        answers = self._client.finish(question)
        return list(answers.by_shard.values()), answers.missing_shards


def _as_sent(request: CandidateRequest) -> bytes | ray.ObjectRef:
    """A small request goes to every shard; a large one is put into the object store once."""
    return request_to_bytes(request) if request.num_bytes <= MAX_BYTES else ray.put(request)
