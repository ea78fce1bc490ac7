"""Which replica is asked next."""

from collections import Counter

import pytest

from retro_ray.retrieval.replicas import FIRST_PAUSE_S, LONGEST_PAUSE_S, REPORT_LIFETIME_S, ReplicaBook

TIMEOUT_S = 10.0


class Clock:
    now = 0.0


def book(num_replicas: int, first: int = 0) -> tuple[ReplicaBook, Clock, set[str]]:
    clock: Clock = Clock()
    ended: set[str] = set()
    return ReplicaBook(num_replicas, TIMEOUT_S, lambda: clock.now, ended.__contains__, first), clock, ended


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_equal_queues_take_turns(num_shards: int) -> None:
    """Per shard: otherwise two shards that are asked in turn would each know only one of two replicas."""
    replicas, _, _ = book(3)
    chosen = [[replicas.choose(shard) for shard in range(num_shards)] for _ in range(9)]
    for shard in range(num_shards):
        assert Counter(row[shard] for row in chosen) == {0: 3, 1: 3, 2: 3}


def test_clients_begin_with_different_replicas() -> None:
    assert {book(3, first)[0].choose(0) for first in range(3)} == {0, 1, 2}


def test_the_shortest_queue_is_asked() -> None:
    replicas, _, _ = book(2)
    for _ in range(3):
        replicas.sent(0, 0)
    assert {replicas.choose(0) for _ in range(4)} == {1}
    assert {replicas.choose(1) for _ in range(4)} == {0, 1}  # another shard's queues are its own
    for _ in range(3):
        replicas.answered(0, 0, num_queued=0)
    replicas.sent(0, 1)
    assert {replicas.choose(0) for _ in range(4)} == {0}


def test_what_a_replica_reports_counts_for_a_while() -> None:
    replicas, clock, _ = book(2)
    replicas.sent(0, 0)
    replicas.answered(0, 0, num_queued=7)
    replicas.sent(0, 1)
    assert {replicas.choose(0) for _ in range(4)} == {1}
    clock.now = REPORT_LIFETIME_S
    assert {replicas.choose(0) for _ in range(4)} == {0}


def test_a_failed_replica_pauses_longer_every_time_until_it_answers() -> None:
    replicas, clock, _ = book(1)
    pauses = []
    for _ in range(8):
        replicas.sent(0, 0)
        replicas.failed(0, 0)
        start = clock.now
        while replicas.choose(0) is None:
            clock.now += FIRST_PAUSE_S / 4
        pauses.append(clock.now - start)
    step = FIRST_PAUSE_S / 4
    assert pauses[0] == pytest.approx(FIRST_PAUSE_S, abs=step)
    assert pauses[3] == pytest.approx(8 * FIRST_PAUSE_S, abs=step)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S, abs=step)
    replicas.sent(0, 0)
    replicas.answered(0, 0, 0)
    assert replicas.choose(0) == 0
    replicas.sent(0, 0)
    replicas.failed(0, 0)
    assert replicas.choose(0) is None
    clock.now += FIRST_PAUSE_S
    assert replicas.choose(0) == 0


def test_a_replica_with_a_late_call_is_asked_last_and_after_timeout_s_not_at_all() -> None:
    replicas, clock, ended = book(2)
    replicas.sent(0, 0)
    replicas.abandoned(0, 0, "late", sent_at=clock.now)
    for _ in range(3):
        replicas.sent(0, 1)
    assert {replicas.choose(0) for _ in range(4)} == {1}
    assert replicas.choose(0, {1}) == 0
    clock.now = TIMEOUT_S
    assert replicas.choose(0, {1}) is None
    ended.add("late")
    assert {replicas.choose(0) for _ in range(4)} == {0}


def test_a_replica_that_is_started_anew_is_asked_once_it_is_ready() -> None:
    replicas, _, ended = book(2)
    replicas.starting(0, 1, "loading")
    assert {replicas.choose(0) for _ in range(4)} == {0}
    ended.add("loading")
    assert {replicas.choose(0) for _ in range(4)} == {0, 1}


def test_passed_over_replicas_are_not_chosen() -> None:
    replicas, _, _ = book(3)
    assert {replicas.choose(0, {0, 2}) for _ in range(5)} == {1}
    assert replicas.choose(0, {0, 1, 2}) is None
