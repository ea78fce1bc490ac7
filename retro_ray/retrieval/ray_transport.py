"""How calls reach shard actors: small ones over a connection where there is one, all others through Ray."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError, RayError, RayTaskError

from retro_ray.config import RetrievalConfig
from retro_ray.database.format import Manifest
from retro_ray.errors import DatabaseError
from retro_ray.retrieval.direct import DirectCall, DirectLine, Endpoint, wait_for_ends
from retro_ray.retrieval.failover import Failure, FailureKind
from retro_ray.retrieval.following import FollowedManifest
from retro_ray.retrieval.messages import CandidateAnswer
from retro_ray.retrieval.shard_actor import ReplicaName, start_replica
from retro_ray.retrieval.wire import answer_from_bytes

logger = logging.getLogger(__name__)

_REVIVALS_AT_A_TIME = 16
_CONNECTIONS_AT_A_TIME = 8
_TURN_S = 0.002
"""Where some calls go through Ray and others do not, they are looked after in turns."""


class RayTransport:
    """Calls of shard actors, and their handles."""

    def __init__(self, follow: FollowedManifest, config: RetrievalConfig, pinned: Manifest | None) -> None:
        self._follow = follow
        self._config = config
        self._pinned = pinned
        self._handles: dict[tuple[int, int], Any] = {}
        self._lines: dict[tuple[int, int], DirectLine] = {}
        self._reviving = ThreadPoolExecutor(_REVIVALS_AT_A_TIME, thread_name_prefix="retro-ray-reviving")
        self._connecting = ThreadPoolExecutor(_CONNECTIONS_AT_A_TIME, thread_name_prefix="retro-ray-connecting")
        self._lock = threading.Lock()

    def start_all(self) -> None:
        """Find or start every replica of every shard; they load side by side."""
        placed: dict[ReplicaName, str] = {}
        shards = range(self._follow.current().manifest.num_shards)
        for shard, replica in itertools.product(shards, range(self._config.num_replicas)):
            self._start(shard, replica, placed)

    def send(self, shard: int, replica: int, request: Any) -> ray.ObjectRef | DirectCall | Failure:
        handle = self._handles.get((shard, replica))
        if handle is None:
            handle = self._start(shard, replica, {})  # the database has more shards than before
        if isinstance(request, bytes) and (call := self._line(shard, replica).send(request)) is not None:
            return call
        return handle.ready.remote() if request is None else handle.search.remote(request)

    def revive(self, shard: int, replica: int, failure: Failure) -> Future[Any] | None:
        if isinstance(failure.cause, (EOFError, OSError)):
            # Ray has not found out yet, and calls would hang until it does: as this one does.
            return self._line(shard, replica).open_another()
        if not isinstance(failure.cause, (ActorDiedError, ActorUnschedulableError)):
            return None  # Ray starts it again
        # Elsewhere: finding it a node can take seconds, and another replica may have the answer at once.
        return self._reviving.submit(self._start_anew, shard, replica)

    def receive(
        self, calls: Sequence[ray.ObjectRef | DirectCall | Failure], timeout_s: float, *, all_of_them: bool
    ) -> list[CandidateAnswer | Failure | None]:
        direct = [call for call in calls if isinstance(call, DirectCall)]
        by_ray = [call for call in calls if not isinstance(call, DirectCall | Failure)]
        if len(direct) + len(by_ray) < len(calls):
            pass  # some have failed already
        elif not by_ray:
            wait_for_ends(direct, timeout_s, all_of_them=all_of_them)
        elif direct:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline and not any(map(self.has_ended, calls)):
                wait_for_ends(direct, _TURN_S, all_of_them=False)
        elif all_of_them:
            try:
                return [_as_answer(answer) for answer in ray.get(by_ray, timeout=timeout_s)]
            except RayError:
                pass  # late or failed: which ones shows below
        else:
            ray.wait(by_ray, num_returns=1, timeout=timeout_s)
        return [_outcome(call) if self.has_ended(call) else None for call in calls]

    def has_ended(self, call: ray.ObjectRef | DirectCall | Failure | Future[Any]) -> bool:
        if isinstance(call, Failure):
            return True
        if isinstance(call, DirectCall):
            return call.has_ended()
        return call.done() if isinstance(call, Future) else bool(ray.wait([call], timeout=0)[0])

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _line(self, shard: int, replica: int) -> DirectLine:
        key = shard, replica
        if key not in self._lines:
            self._lines[key] = DirectLine(partial(self._endpoint, shard, replica), self._connecting.submit)
        return self._lines[key]

    def _endpoint(self, shard: int, replica: int) -> Endpoint | None:
        try:
            return ray.get(self._handles[shard, replica].endpoint.remote(), timeout=self._config.timeout_s)
        except RayError:
            return None  # it is being started, or is no more: whoever asks it finds out

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


def _as_answer(answer: CandidateAnswer | bytes) -> CandidateAnswer:
    return answer_from_bytes(answer) if isinstance(answer, bytes) else answer


def _outcome(call: ray.ObjectRef | DirectCall | Failure) -> CandidateAnswer | Failure | None:
    if isinstance(call, Failure):
        return call
    if isinstance(call, DirectCall):
        return answer_from_bytes(call.outcome) if isinstance(call.outcome, bytes) else call.outcome
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
