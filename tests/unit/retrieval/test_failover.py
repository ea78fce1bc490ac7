"""What a client does when a shard does not answer, against replicas that do as they are told."""

from collections import Counter
from collections.abc import Callable

import pytest

from retro_ray.config import RetrievalPolicy
from retro_ray.errors import RetrievalError
from retro_ray.retrieval.failover import (
    HEDGE_FACTOR,
    HEDGED_SHARE,
    HEDGES_IN_A_ROW,
    MIN_HEDGE_S,
    Answers,
    FailoverClient,
)
from tests.unit.retrieval.fake_transport import (
    DAMAGED,
    DEAD,
    HANGS,
    OK,
    REFUSED,
    Behaviour,
    FakeTransport,
)

TIMEOUT_S = 10.0
HANGS_UNTIL_100 = Behaviour(takes_s=100)


def client(transport: FakeTransport, policy: RetrievalPolicy = "wait", num_replicas: int = 1) -> FailoverClient:
    return FailoverClient(
        transport, num_replicas=num_replicas, timeout_s=TIMEOUT_S, policy=policy, database="/home/database"
    )


def ask(asking: FailoverClient, num_shards: int = 3, request: str = "q") -> Answers:
    return asking.finish(asking.begin(request, num_shards))


def only(shard: int, replica: int, behaviour: Behaviour) -> Callable[[int, int, float], Behaviour]:
    """That replica behaves so, the others as they should."""
    return lambda s, r, now: behaviour if (s, r) == (shard, replica) else OK


def until(end: float, behaviour: Behaviour) -> Callable[[int, int, float], Behaviour]:
    """Every replica behaves so until then."""
    return lambda s, r, now: behaviour if now < end else OK


def test_every_shard_answers_once() -> None:
    transport = FakeTransport()
    answers = ask(client(transport), num_shards=4)
    assert [(reply.shard, reply.request) for reply in answers.by_shard.values()] == [(s, "q") for s in range(4)]
    assert answers.missing_shards == ()
    assert transport.sent == [(s, 0) for s in range(4)]


def test_a_dead_replica_costs_nothing_but_another_call() -> None:
    transport = FakeTransport(only(1, 0, DEAD))
    asking = client(transport, num_replicas=2)
    for _ in range(20):
        answers = ask(asking)
        assert [reply.shard for reply in answers.by_shard.values()] == [0, 1, 2]
        assert answers.by_shard[1].replica == 1
    assert transport.clock < 1
    # It pauses in between: not every query tries it first.
    assert transport.sent.count((1, 0)) < 8
    assert transport.sent.count((1, 1)) == 20


def test_a_late_call_is_made_to_another_replica_too_which_is_preferred_from_then_on() -> None:
    transport = FakeTransport(lambda s, r, now: HANGS_UNTIL_100 if r == 0 and now < 50 else OK)
    asking = client(transport, num_replicas=2)
    for _ in range(20):
        assert ask(asking, num_shards=1).by_shard[0].replica == 1
    assert MIN_HEDGE_S <= transport.clock < 0.1
    assert transport.sent.count((0, 0)) == 1
    transport.clock = 101
    replicas = Counter(ask(asking, num_shards=1).by_shard[0].replica for _ in range(10))
    assert replicas[0] == replicas[1] == 5


def test_a_call_is_late_when_it_takes_much_longer_than_calls_do() -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(takes_s=0.5))
    asking = client(transport, num_replicas=2)
    for _ in range(200):
        ask(asking, num_shards=1)
    assert len(transport.sent) <= 200 + HEDGES_IN_A_ROW  # until it has learnt how long calls take
    transport.behave = lambda s, r, now: HANGS if r == 0 and now < 1000 else OK
    start = transport.clock = 500.0
    assert ask(asking, num_shards=1).by_shard[0].replica == ask(asking, num_shards=1).by_shard[0].replica == 1
    assert transport.clock - start == pytest.approx(HEDGE_FACTOR * 0.5, rel=0.2)


def test_few_calls_are_made_twice_however_slow_all_are() -> None:
    """Each takes twice as long as the one before: all are late, and asking twice would make it worse."""
    takes_s = 0.01

    def behave(shard: int, replica: int, now: float) -> Behaviour:
        nonlocal takes_s
        takes_s = 3 * MIN_HEDGE_S if takes_s == 0.01 else 0.01
        return Behaviour(takes_s=takes_s)

    transport = FakeTransport(behave)
    asking = client(transport, num_replicas=2)
    for _ in range(1000):
        ask(asking, num_shards=1)
    assert HEDGES_IN_A_ROW <= len(transport.sent) - 1000 <= HEDGES_IN_A_ROW + 2 * 1000 * HEDGED_SHARE


def test_a_replica_is_given_up_after_timeout_s_where_no_call_may_be_made_twice() -> None:
    transport = FakeTransport(only(0, 0, HANGS))
    asking = client(transport, num_replicas=2)
    asking._hedges_left = 0
    for _ in range(5):
        assert ask(asking, num_shards=1).by_shard[0].replica == 1
    assert TIMEOUT_S <= transport.clock < TIMEOUT_S + 1


def test_the_first_of_two_answers_is_taken() -> None:
    """The late one answers while the other is still at it."""

    def behave(shard: int, replica: int, now: float) -> Behaviour:
        return Behaviour(takes_s=2.0) if now == 0 else Behaviour(takes_s=5.0)

    transport = FakeTransport(behave)
    answers = ask(client(transport, num_replicas=2), num_shards=1)
    assert transport.clock == 2.0
    assert answers.by_shard[0].replica == transport.sent[0][1]
    assert len(transport.sent) == 2


def test_replicas_that_are_late_but_live_are_waited_for() -> None:
    """However many calls are late at each of them: with `fail`, it would be an error to have nobody to ask."""
    transport = FakeTransport(lambda s, r, now: Behaviour(takes_s=1.0))
    asking = client(transport, "fail", num_replicas=2)
    questions = [asking.begin(number, 2) for number in range(8)]
    for question in questions:
        assert len(asking.finish(question).by_shard) == 2
        assert len(ask(asking, num_shards=2).by_shard) == 2


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_wait_waits_until_a_replica_lives_again(num_replicas: int, caplog: pytest.LogCaptureFixture) -> None:
    transport = FakeTransport(lambda s, r, now: DEAD if s < 2 and now < 100 else OK)
    answers = ask(client(transport, "wait", num_replicas))
    assert len(answers.by_shard) == 3
    assert 100 <= transport.clock < 102
    assert len(transport.sent) < 1000  # it pauses in between
    assert 2 <= len(caplog.records) <= 2 * 10 * num_replicas  # and says now and then what it waits for
    assert "shard 1 of 3" in caplog.text
    assert "its actor died: killed" in caplog.text


def test_wait_waits_for_an_answer_that_takes_longer_than_timeout_s(caplog: pytest.LogCaptureFixture) -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(takes_s=5 * TIMEOUT_S))
    assert len(ask(client(transport, "wait")).by_shard) == 3
    assert len(transport.sent) == 3  # and does not ask anew meanwhile
    assert "timeout_s=10 passed" in caplog.text


def test_partial_leaves_a_dead_shard_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    transport = FakeTransport(lambda s, r, now: DEAD if s == 1 and now < 50 else OK)
    asking = client(transport, "partial")
    for _ in range(5):
        answers = ask(asking)
        assert sorted(answers.by_shard) == [0, 2]
        assert answers.missing_shards == (1,)
    assert transport.clock < 1
    assert caplog.text.count("shard 1 of 3") == 1
    transport.clock = 51
    answers = ask(asking)
    assert sorted(answers.by_shard) == [0, 1, 2]
    assert answers.missing_shards == ()


def test_partial_waits_for_a_hanging_shard_once() -> None:
    transport = FakeTransport(only(2, 0, HANGS))
    asking = client(transport, "partial")
    for _ in range(5):
        assert ask(asking).missing_shards == (2,)
    assert TIMEOUT_S <= transport.clock < TIMEOUT_S + 1


def test_partial_can_miss_all() -> None:
    answers = ask(client(FakeTransport(until(1e9, DEAD)), "partial"))
    assert answers.by_shard == {}
    assert answers.missing_shards == (0, 1, 2)


@pytest.mark.parametrize(("behaviour", "cause"), [(DEAD, "its actor died: killed"), (HANGS, r"timeout_s=10 passed")])
def test_fail_names_shard_cause_and_setting(behaviour: Behaviour, cause: str) -> None:
    with pytest.raises(RetrievalError, match=rf"shard 1 of 3 .*/home/database .*{cause}.*policy \(fail\)") as caught:
        ask(client(FakeTransport(lambda s, r, now: behaviour if s == 1 else OK), "fail", 2))
    assert "\n" not in str(caught.value)


def test_a_failed_question_leaves_no_queue_behind() -> None:
    """The calls of the other shards are not counted for ever."""
    transport = FakeTransport(lambda s, r, now: DEAD if s == 0 and now < 5 else Behaviour(takes_s=1))
    asking = client(transport, "fail", 2)
    for _ in range(3):
        with pytest.raises(RetrievalError):
            ask(asking)
    transport.clock = 10
    replicas = Counter(reply.replica for _ in range(10) for reply in ask(asking).by_shard.values())
    assert replicas[0] == pytest.approx(15, abs=1)


@pytest.mark.parametrize("policy", ["wait", "partial", "fail"])
def test_a_search_that_itself_fails_is_an_error_at_once(policy: RetrievalPolicy) -> None:
    transport = FakeTransport(only(0, 0, Behaviour(failure=REFUSED)))
    with pytest.raises(RetrievalError, match=r"shard 0 of 3 .*5 dimensions, not 8"):
        ask(client(transport, policy))
    assert len(transport.sent) == 3


@pytest.mark.parametrize("policy", ["wait", "fail"])
def test_damage_is_an_error_once_every_replica_has_it(policy: RetrievalPolicy) -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(failure=DAMAGED) if s == 2 else OK, revival_s=1.0)
    with pytest.raises(RetrievalError, match=r"shard 2 of 3 .*bytes are missing.*verify"):
        ask(client(transport, policy, num_replicas=2))
    assert transport.sent.count((2, 0)) == transport.sent.count((2, 1)) == 1


def test_damage_is_healed_by_mending_the_file() -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(failure=DAMAGED) if now < 30 else OK, revival_s=1.0)
    asking = client(transport, "wait")
    with pytest.raises(RetrievalError, match="bytes are missing"):
        ask(asking)
    with pytest.raises(RetrievalError, match="bytes are missing"):
        ask(asking)
    transport.clock = 30
    assert len(ask(asking).by_shard) == 3


def test_partial_passes_over_a_damaged_shard() -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(failure=DAMAGED) if s == 2 else OK, revival_s=1.0)
    asking = client(transport, "partial")
    for _ in range(50):
        assert ask(asking).missing_shards == (2,)
    assert transport.sent.count((2, 0)) <= 2  # while it is being loaded again, nobody asks


def test_a_replica_that_died_for_good_is_started_anew_once() -> None:
    transport = FakeTransport(lambda s, r, now: DEAD if now < 0.001 else OK, revival_s=3.0)
    answers = ask(client(transport, "wait"))
    assert len(answers.by_shard) == 3
    assert sorted(transport.revived) == [(0, 0), (1, 0), (2, 0)]
    assert transport.clock >= 3


def test_questions_overlap() -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(takes_s=1.0))
    asking = client(transport)
    questions = [asking.begin(number, 2) for number in range(5)]
    for number, question in enumerate(questions):
        assert {reply.request for reply in asking.finish(question).by_shard.values()} == {number}
    assert transport.clock == 1.0


def test_a_longer_queue_is_avoided() -> None:
    transport = FakeTransport(lambda s, r, now: Behaviour(num_queued=5 if r == 0 else 0))
    asking = client(transport, num_replicas=2)
    replicas = Counter(reply.replica for _ in range(20) for reply in ask(asking, 1).by_shard.values())
    assert replicas[0] <= 2
