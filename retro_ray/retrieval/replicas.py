"""Which replica of a shard to ask: the one with the shortest queue among those that answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

REPORT_LIFETIME_S = 1.0
"""What a replica said of its queue is forgotten after this: else one that was busy once is never asked again."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
"""A replica that failed is passed over for so long, at first and at most, where there is another."""


@dataclass
class _Replica:
    num_in_flight: int = 0
    num_queued: int = 0
    reported_at: float = float("-inf")
    num_failures: int = 0
    """In a row."""
    paused_until: float = float("-inf")
    starting: list[Any] = field(default_factory=list)
    """Calls that end once it has been started: until then it is not asked."""
    late: list[tuple[Any, float]] = field(default_factory=list)
    """Calls that another replica answered first, and when they were sent: it is asked last, and after
    timeout_s not at all, until they have ended."""


class ReplicaBook:
    """What one client knows of all replicas of all shards; not thread-safe.

    Args:
        num_replicas: of each shard.
        timeout_s: a replica that has a call for longer is not asked.
        now: a clock, in seconds.
        is_finished: whether a call that was given up has ended meanwhile.
        first: the replica that is asked first; clients that differ in it spread over the replicas.
    """

    def __init__(
        self,
        num_replicas: int,
        timeout_s: float,
        now: Callable[[], float],
        is_finished: Callable[[Any], bool],
        first: int = 0,
    ) -> None:
        self._num_replicas = num_replicas
        self._timeout_s = timeout_s
        self._now = now
        self._is_finished = is_finished
        self._first = first
        self._turns: dict[int, itertools.count[int]] = {}
        self._replicas: dict[tuple[int, int], _Replica] = {}

    def choose(self, shard: int, passed_over: frozenset[int] | set[int] = frozenset()) -> int | None:
        """The replica with the shortest queue, of equal ones another every time; None where none is fit.

        Args:
            shard: whose replicas.
            passed_over: replicas that were asked already.
        """
        turn = next(self._turns.setdefault(shard, itertools.count(self._first + shard))) % self._num_replicas
        in_turn = [(turn + step) % self._num_replicas for step in range(self._num_replicas)]
        fit = [replica for replica in in_turn if replica not in passed_over and self._is_fit(shard, replica)]
        return min(fit, key=lambda replica: self._reluctance(shard, replica), default=None)

    def sent(self, shard: int, replica: int) -> None:
        self._of(shard, replica).num_in_flight += 1

    def answered(self, shard: int, replica: int, num_queued: int) -> None:
        """An answer came, which said how many requests wait."""
        state = self._of(shard, replica)
        state.num_in_flight -= 1
        state.num_queued, state.reported_at = num_queued, self._now()
        state.num_failures, state.paused_until = 0, float("-inf")

    def failed(self, shard: int, replica: int) -> None:
        """A call failed: the replica is passed over for a while, a longer one every time."""
        state = self._of(shard, replica)
        state.num_in_flight -= 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**state.num_failures)
        state.num_failures += 1
        state.paused_until = self._now() + pause_s

    def abandoned(self, shard: int, replica: int, call: Any, sent_at: float) -> None:
        """A call that has not ended is waited for no longer."""
        state = self._of(shard, replica)
        state.num_in_flight -= 1
        state.late.append((call, sent_at))

    def starting(self, shard: int, replica: int, call: Any) -> None:
        """The replica is being started, and fit once `call` has ended."""
        self._of(shard, replica).starting.append(call)

    def _is_fit(self, shard: int, replica: int) -> bool:
        state, now = self._of(shard, replica), self._now()
        state.starting = [call for call in state.starting if not self._is_finished(call)]
        state.late = [(call, sent_at) for call, sent_at in state.late if not self._is_finished(call)]
        hangs = any(now - sent_at >= self._timeout_s for _, sent_at in state.late)
        return not state.starting and not hangs and now >= state.paused_until

    def _reluctance(self, shard: int, replica: int) -> tuple[bool, int]:
        """Which of two is asked later."""
        return bool(self._of(shard, replica).late), self._queue_length(shard, replica)

    def _queue_length(self, shard: int, replica: int) -> int:
        state = self._of(shard, replica)
        is_fresh = self._now() - state.reported_at < REPORT_LIFETIME_S
        return state.num_in_flight + (state.num_queued if is_fresh else 0)

    def _of(self, shard: int, replica: int) -> _Replica:
        return self._replicas.setdefault((shard, replica), _Replica())
