"""Asking every shard, each through one of its replicas, and what happens when one does not answer.

Ray takes a second to find out that an actor died with a call in it. So a call that takes much longer
than others did is made to another replica as well, and the first answer counts (hedged requests: Dean
and Barroso, The Tail at Scale, 2013); few of them at most, so that a slow cluster is not asked twice.

Decisions only: how a call is made, and how time passes, is a Transport's business. So all of it runs
in tests without Ray, without waiting, and the same way every time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from retro_ray.config import RetrievalPolicy
from retro_ray.errors import RetrievalError
from retro_ray.retrieval.replicas import FIRST_PAUSE_S, ReplicaBook

logger = logging.getLogger(__name__)

HEDGE_FACTOR = 8.0
"""A call is late when it has taken so many times as long as calls do."""
MIN_HEDGE_S = 0.05
HEDGED_SHARE = 0.05
"""Of all calls, so many may be made twice for being late,"""
HEDGES_IN_A_ROW = 10.0
"""and after a quiet time, so many at once."""
_SMOOTHING = 0.1


class FailureKind(Enum):
    """What can be done about a failure."""

    AWAY = "away"
    """The actor died, or is being started again: another replica may answer, and later this one."""
    DAMAGED = "damaged"
    """The shard cannot be loaded: waiting mends nothing."""
    REFUSED = "refused"
    """The search itself raised: so would any other."""


@dataclass(frozen=True)
class Failure:
    """Why a call has no answer."""

    kind: FailureKind
    reason: str
    """One line."""
    cause: BaseException | None = None


class Reply(Protocol):
    """What every answer says of the replica that gave it."""

    @property
    def num_queued(self) -> int:
        """Requests that wait at the replica."""
        ...


class Transport(Protocol):
    """How calls are made; a call is an opaque handle."""

    def send(self, shard: int, replica: int, request: Any) -> Any:
        """Begin a call; returns at once."""
        ...

    def revive(self, shard: int, replica: int, failure: Failure) -> Any | None:
        """See to it that a replica that failed comes back; returns at once.

        Returns:
            A call that ends once it has; None where it comes back by itself.
        """
        ...

    def receive(self, calls: Sequence[Any], timeout_s: float, *, all_of_them: bool) -> list[Any | Failure | None]:
        """Answers and failures of `calls`, None for those that have not ended.

        Returns when all have ended (or, unless `all_of_them`, when any has), when one has failed, or
        after `timeout_s`; where calls take different ways, as soon as any has ended.
        """
        ...

    def has_ended(self, call: Any) -> bool:
        """Whether a call, or what `revive` gave, has ended by now, well or badly."""
        ...

    def now(self) -> float:
        """A clock, in seconds."""
        ...

    def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, eq=False)
class _Call:
    """A request on its way to a replica."""

    replica: int
    handle: Any
    sent_at: float


@dataclass
class _Asked:
    """One shard's part of a question."""

    shard: int
    num_shards: int
    calls: list[_Call] = field(default_factory=list)
    """Those that may still answer."""
    deadline: float = 0.0
    """When the newest of them has taken too long."""
    asked_at: float = 0.0
    """When the question came."""
    warn_at: float = 0.0
    """When to say next that it is still waited for."""
    may_hedge: bool = False
    """That is only when it is late: it may still be waited for."""
    tried: set[int] = field(default_factory=set)
    """Replicas that failed or were too slow since all of them were last tried."""
    failure: Failure | None = None
    """The last one."""
    answer: Any | None = None
    is_missing: bool = False

    @property
    def is_open(self) -> bool:
        return self.answer is None and not self.is_missing


@dataclass(frozen=True)
class Question:
    """A request that is on its way to all shards."""

    request: Any
    parts: list[_Asked]


@dataclass(frozen=True)
class Answers:
    """What the shards answered."""

    by_shard: dict[int, Any]
    missing_shards: tuple[int, ...]
    """Shards without an answer; only with the policy `partial`."""


class FailoverClient:
    """Asks shards through their replicas. Any number of threads may use it.

    Args:
        transport: makes the calls.
        num_replicas: of every shard.
        timeout_s: a replica that takes longer is given up for another one.
        policy: what to do where no replica of a shard answers: `wait` until one does, leave the shard
            out and say so (`partial`), or raise (`fail`).
        database: names the database in messages.
        first_replica: where to begin; differs between clients, so that they spread.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        num_replicas: int,
        timeout_s: float,
        policy: RetrievalPolicy,
        database: str,
        first_replica: int = 0,
    ) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._policy: RetrievalPolicy = policy
        self._database = database
        self._replicas = ReplicaBook(num_replicas, timeout_s, transport.now, transport.has_ended, first_replica)
        self._num_replicas = num_replicas
        self._typical_s = 0.0
        self._hedges_left = HEDGES_IN_A_ROW
        self._last_failures: dict[int, Failure] = {}
        self._reported_missing: set[int] = set()
        self._lock = threading.Lock()

    def begin(self, request: Any, num_shards: int) -> Question:
        """Send a request to all shards; several questions may be on their way at once."""
        now = self._transport.now()
        question = Question(request, [_Asked(shard, num_shards, asked_at=now) for shard in range(num_shards)])
        for asked in question.parts:
            self._ask_another(asked, request, set())
        return question

    def finish(self, question: Question) -> Answers:
        """Wait for the answers.

        Raises:
            RetrievalError: a shard did not answer, and the policy (or the failure) leaves nothing else.
        """
        try:
            self._wait_for_answers(question)
        finally:
            self.drop(question)
        return Answers(
            {asked.shard: asked.answer for asked in question.parts if not asked.is_missing},
            tuple(asked.shard for asked in question.parts if asked.is_missing),
        )

    def drop(self, question: Question) -> None:
        """Take no interest any longer in what has not been answered."""
        for asked in question.parts:
            self._abandon(asked)

    def _wait_for_answers(self, question: Question) -> None:
        all_of_them = True  # the usual case in one go; one by one only after something went wrong
        while waiting := [asked for asked in question.parts if asked.is_open]:
            calls = [(asked, call) for asked in waiting for call in asked.calls]
            deadline = min(asked.deadline if asked.calls else 0.0 for asked in waiting)
            timeout_s = max(0.0, deadline - self._transport.now())
            outcomes = self._transport.receive([call.handle for _, call in calls], timeout_s, all_of_them=all_of_them)
            for (asked, call), outcome in zip(calls, outcomes, strict=True):
                self._take(asked, call, outcome)
            for asked in waiting:
                if asked.is_open and (not asked.calls or self._transport.now() >= asked.deadline):
                    all_of_them = False
                    self._go_on(asked, question.request)

    def _take(self, asked: _Asked, call: _Call, outcome: Any | Failure | None) -> None:
        """Note what became of a call."""
        if outcome is None or asked.answer is not None:
            return
        asked.calls.remove(call)
        if isinstance(outcome, Failure):
            with self._lock:
                self._replicas.failed(asked.shard, call.replica)
                self._last_failures[asked.shard] = outcome
            asked.tried.add(call.replica)
            asked.failure = outcome
            self._handle(asked, call.replica, outcome)
            return
        with self._lock:
            self._replicas.answered(asked.shard, call.replica, outcome.num_queued)
            self._reported_missing.discard(asked.shard)
            self._typical_s += _SMOOTHING * (self._transport.now() - call.sent_at - self._typical_s)
        asked.answer = outcome
        self._abandon(asked)

    def _handle(self, asked: _Asked, replica: int, failure: Failure) -> None:
        if failure.kind is FailureKind.REFUSED:
            raise self._error(asked)
        coming_back = self._transport.revive(asked.shard, replica, failure)
        if coming_back is not None:
            with self._lock:
                self._replicas.starting(asked.shard, replica, coming_back)

    def _go_on(self, asked: _Asked, request: Any) -> None:
        """A shard has not answered in time, or its replica has failed: ask another, or do as the policy says."""
        busy = {call.replica for call in asked.calls}
        if asked.calls and asked.may_hedge:
            asked.may_hedge, asked.deadline = False, asked.calls[-1].sent_at + self._timeout_s
            if self._take_hedge():
                self._ask_another(asked, request, busy)
            return
        asked.tried |= busy
        if self._ask_another(asked, request, asked.tried):
            return
        is_damaged = asked.failure is not None and asked.failure.kind is FailureKind.DAMAGED and not asked.calls
        if self._policy == "partial":
            asked.is_missing = True
            self._report_missing(asked)
            self._abandon(asked)
        elif self._policy == "fail" or is_damaged:
            raise self._error(asked)
        else:
            self._wait(asked)

    def _wait(self, asked: _Asked) -> None:
        """No replica can be asked now: let time pass, and then try all of them again."""
        now = self._transport.now()
        if asked.calls:
            asked.deadline = now + self._timeout_s
        else:
            self._transport.sleep(FIRST_PAUSE_S)
        asked.warn_at = asked.warn_at or asked.asked_at + self._timeout_s
        if now >= asked.warn_at:
            logger.warning("%s; waiting on", self._description(asked))
            asked.warn_at = now + self._timeout_s
        asked.tried = {call.replica for call in asked.calls}

    def _ask_another(self, asked: _Asked, request: Any, passed_over: set[int]) -> bool:
        """Send the request to the fittest of the other replicas; False where there is none."""
        with self._lock:
            replica = self._replicas.choose(asked.shard, passed_over)
            if replica is None:
                return False
            self._replicas.sent(asked.shard, replica)
            self._hedges_left = min(HEDGES_IN_A_ROW, self._hedges_left + HEDGED_SHARE)
            late_s = max(MIN_HEDGE_S, HEDGE_FACTOR * self._typical_s)
        now = self._transport.now()
        asked.calls.append(_Call(replica, self._transport.send(asked.shard, replica, request), now))
        asked.may_hedge = not passed_over and self._num_replicas > 1 and late_s < self._timeout_s
        asked.deadline = now + (late_s if asked.may_hedge else self._timeout_s)
        return True

    def _take_hedge(self) -> bool:
        """Whether one more call may be made twice."""
        with self._lock:
            if self._hedges_left < 1:
                return False
            self._hedges_left -= 1
            return True

    def _abandon(self, asked: _Asked) -> None:
        """Wait no longer for what is still on its way."""
        with self._lock:
            for call in asked.calls:
                self._replicas.abandoned(asked.shard, call.replica, call.handle, call.sent_at)
        asked.calls.clear()

    def _report_missing(self, asked: _Asked) -> None:
        """Once until the shard answers again: every query without it says so itself."""
        with self._lock:
            is_news = asked.shard not in self._reported_missing
            self._reported_missing.add(asked.shard)
        if is_news:
            logger.warning("%s", self._description(asked))

    def _error(self, asked: _Asked) -> RetrievalError:
        error = RetrievalError(self._description(asked))
        error.__cause__ = None if asked.failure is None else asked.failure.cause
        return error

    def _description(self, asked: _Asked) -> str:
        """Shard, cause, setting and way out, in one line."""
        if asked.calls:
            cause = f"timeout_s={self._timeout_s:g} passed"
        else:
            failure = asked.failure or self._last_failures.get(asked.shard)
            cause = "its actor is being started" if failure is None else failure.reason
        return (
            f"shard {asked.shard} of {asked.num_shards} of the database in {self._database} did not answer ({cause}): "
            f"{self._way_out}"
        )

    @property
    def _way_out(self) -> str:
        others = " or ".join(policy for policy in ("wait", "partial") if policy != self._policy)
        return (
            f"raise timeout_s or num_replicas, set the policy ({self._policy}) to {others}, or check the files "
            "with `python -m retro_ray verify`"
        )
