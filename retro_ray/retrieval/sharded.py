"""A Retriever over shard actors: in parallel, over replicas, and never silently incomplete."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError, RayError, RayTaskError

from retro_ray.config import RetrievalConfig
from retro_ray.database.format import Manifest, database_directory
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError
from retro_ray.retrieval.database_retriever import DatabaseRetriever
from retro_ray.retrieval.failover import FailoverClient, Failure, FailureKind
from retro_ray.retrieval.following import FollowedManifest
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest
from retro_ray.retrieval.shard_actor import ReplicaName, start_replica
from retro_ray.retrieval.wire import MAX_BYTES, answer_from_bytes, request_to_bytes

logger = logging.getLogger(__name__)

_REVIVALS_AT_A_TIME = 16
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


class RayTransport:
    """Calls of shard actors, and their handles."""

    def __init__(self, follow: FollowedManifest, config: RetrievalConfig, pinned: Manifest | None) -> None:
        self._follow = follow
        self._config = config
        self._pinned = pinned
        self._handles: dict[tuple[int, int], Any] = {}
        self._reviving = ThreadPoolExecutor(_REVIVALS_AT_A_TIME, thread_name_prefix="retro-ray-reviving")
        self._lock = threading.Lock()

    def start_all(self) -> None:
        """Find or start every replica of every shard; they load side by side."""
        placed: dict[ReplicaName, str] = {}
        shards = range(self._follow.current().manifest.num_shards)
        for shard, replica in itertools.product(shards, range(self._config.num_replicas)):
            self._start(shard, replica, placed)

    def send(self, shard: int, replica: int, request: Any) -> ray.ObjectRef:
        handle = self._handles.get((shard, replica))
        if handle is None:
            handle = self._start(shard, replica, {})  # the database has more shards than before
        return handle.ready.remote() if request is None else handle.search.remote(request)

    def revive(self, shard: int, replica: int, failure: Failure) -> Future[Any] | None:
        if not isinstance(failure.cause, (ActorDiedError, ActorUnschedulableError)):
            return None  # Ray starts it again
        # Elsewhere: finding it a node can take seconds, and another replica may have the answer at once.
        return self._reviving.submit(self._start_anew, shard, replica)

    def receive(
        self, calls: Sequence[ray.ObjectRef], timeout_s: float, *, all_of_them: bool
    ) -> list[CandidateAnswer | Failure | None]:
        if not calls:
            return []
        if all_of_them:
            try:
                return [_as_answer(answer) for answer in ray.get(list(calls), timeout=timeout_s)]
            except RayError:
                pass  # late or failed: which ones shows below
        else:
            ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        ended = set(ray.wait(list(calls), num_returns=len(calls), timeout=0)[0])
        return [_outcome(call) if call in ended else None for call in calls]

    def has_ended(self, call: ray.ObjectRef | Future[Any]) -> bool:
        return call.done() if isinstance(call, Future) else bool(ray.wait([call], timeout=0)[0])

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _start_anew(self, shard: int, replica: int) -> None:
        """Returns once the replica is loaded, or when it has had its time: then whoever asks it finds out more."""
        try:
            ray.get(self._start(shard, replica, {}).ready.remote(), timeout=self._config.timeout_s)
        except (RayError, DatabaseError) as error:
            logger.info(
                "replica %d of shard %d is not back yet: %s", replica, shard, " ".join(str(error).split())[:300]
            )

    def _start(self, shard: int, replica: int, placed: dict[ReplicaName, str]) -> Any:
        build = None if self._pinned is None else self._pinned.build
        name = ReplicaName(self._follow.directory, shard, replica, build)
        with self._lock:
            handle = start_replica(
                name,
                pinned=self._pinned,
                mmap=self._config.mmap,
                num_shards=self._follow.current().manifest.num_shards,
                placed=placed,
            )
            self._handles[shard, replica] = handle
            return handle


def _as_sent(request: CandidateRequest) -> bytes | ray.ObjectRef:
    """A small request goes to every shard; a large one is put into the object store once."""
    return request_to_bytes(request) if request.num_bytes <= MAX_BYTES else ray.put(request)


def _as_answer(answer: CandidateAnswer | bytes) -> CandidateAnswer:
    return answer_from_bytes(answer) if isinstance(answer, bytes) else answer


def _outcome(call: ray.ObjectRef) -> CandidateAnswer | Failure:
    try:
        return _as_answer(ray.get(call))
    except RayTaskError as error:
        if isinstance(error.cause, DatabaseError):
            return Failure(FailureKind.DAMAGED, f"it cannot be loaded: {error.cause}", error)
        return Failure(FailureKind.REFUSED, f"the search failed: {_last_line(error)}", error)
    except RayActorError as error:
        if error.actor_init_failed:
            return Failure(FailureKind.DAMAGED, f"it cannot be loaded: {_last_line(error)}", error)
        return Failure(FailureKind.AWAY, f"its actor died: {' '.join(str(error).split())[:300]}", error)
    except RayError as error:
        return Failure(FailureKind.AWAY, f"Ray lost the call: {' '.join(str(error).split())[:300]}", error)


def _last_line(error: RayError) -> str:
    """Ray's message is the worker's traceback; its last line is the error."""
    return str(error).strip().splitlines()[-1]
