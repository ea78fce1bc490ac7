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
    stuck: list[Any] = field(default_factory=list)
    """Calls that were given up and may still run: a replica that has any is not asked again."""


class ReplicaBook:
    """What one client knows of all replicas of all shards; not thread-safe.

    Args:
        num_replicas: of each shard.
        now: a clock, in seconds.
        is_finished: whether a call that was given up has ended meanwhile.
        first: the replica that is asked first; clients that differ in it spread over the replicas.
    """

    def __init__(
        self, num_replicas: int, now: Callable[[], float], is_finished: Callable[[Any], bool], first: int = 0
    ) -> None:
        self._num_replicas = num_replicas
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
        return min(fit, key=lambda replica: self._queue_length(shard, replica), default=None)

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

    def abandoned(self, shard: int, replica: int, call: Any) -> None:
        """A call that has not ended is waited for no longer."""
        state = self._of(shard, replica)
        state.num_in_flight -= 1
        state.stuck.append(call)

    def starting(self, shard: int, replica: int, call: Any) -> None:
        """The replica was started anew, and is fit once `call` has ended."""
        self._of(shard, replica).stuck.append(call)

    def _is_fit(self, shard: int, replica: int) -> bool:
        state = self._of(shard, replica)
        if state.stuck:
            state.stuck = [call for call in state.stuck if not self._is_finished(call)]
        return not state.stuck and self._now() >= state.paused_until

    def _queue_length(self, shard: int, replica: int) -> int:
        state = self._of(shard, replica)
        is_fresh = self._now() - state.reported_at < REPORT_LIFETIME_S
        return state.num_in_flight + (state.num_queued if is_fresh else 0)

    def _of(self, shard: int, replica: int) -> _Replica:
        return self._replicas.setdefault((shard, replica), _Replica())
