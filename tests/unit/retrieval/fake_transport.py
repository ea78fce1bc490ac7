"""Shard replicas that answer, fail, hang and come back on command, under a clock that only calls advance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from retro_ray.retrieval.failover import Failure, FailureKind

NEVER = float("inf")
DIED = Failure(FailureKind.AWAY, "its actor died: killed")
DAMAGED = Failure(FailureKind.DAMAGED, "it cannot be loaded: bytes are missing")
REFUSED = Failure(FailureKind.REFUSED, "the search failed: 5 dimensions, not 8")


@dataclass(frozen=True)
class FakeReply:
    """An answer that says who gave it."""

    shard: int
    replica: int
    request: Any
    num_queued: int = 0


@dataclass(frozen=True)
class Behaviour:
    """What a replica does with a call."""

    takes_s: float = 0.001
    failure: Failure | None = None
    num_queued: int = 0


OK = Behaviour()
DEAD = Behaviour(failure=DIED)
HANGS = Behaviour(takes_s=NEVER)


@dataclass(eq=False)
class FakeCall:
    shard: int
    replica: int
    ends_at: float
    outcome: Any


class FakeTransport:
    """A Transport; `behave` says what a replica does with the call that it gets now.

    Args:
        behave: (shard, replica, now) -> behaviour.
        answer: (shard, request) -> what a healthy replica answers.
        revival_s: a dead replica that is revived needs so long; None: it comes back by itself.
    """

    def __init__(
        self,
        behave: Callable[[int, int, float], Behaviour] = lambda shard, replica, now: OK,
        answer: Callable[[int, Any], Any] | None = None,
        revival_s: float | None = None,
    ) -> None:
        self.behave = behave
        self.clock = 0.0
        self.sent: list[tuple[int, int]] = []
        self.revived: list[tuple[int, int]] = []
        self._answer = answer
        self._revival_s = revival_s

    def send(self, shard: int, replica: int, request: Any) -> FakeCall:
        self.sent.append((shard, replica))
        behaviour = self.behave(shard, replica, self.clock)
        if behaviour.failure is not None:
            outcome: Any = behaviour.failure
        elif self._answer is not None:
            outcome = self._answer(shard, request)
        else:
            outcome = FakeReply(shard, replica, request, behaviour.num_queued)
        return FakeCall(shard, replica, self.clock + behaviour.takes_s, outcome)

    def revive(self, shard: int, replica: int, failure: Failure) -> FakeCall | None:
        self.revived.append((shard, replica))
        if self._revival_s is None:
            return None
        return FakeCall(shard, replica, self.clock + self._revival_s, FakeReply(shard, replica, "ready"))

    def receive(self, calls: Sequence[FakeCall], timeout_s: float, *, all_of_them: bool) -> list[Any]:
        ends = [call.ends_at for call in calls]
        failing = [call.ends_at for call in calls if isinstance(call.outcome, Failure)]
        until = min([max(ends, default=0), *failing]) if all_of_them else min(ends, default=0)
        self.clock = max(self.clock, min(until, self.clock + timeout_s))
        return [call.outcome if call.ends_at <= self.clock else None for call in calls]

    def has_ended(self, call: FakeCall) -> bool:
        return call.ends_at <= self.clock

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
