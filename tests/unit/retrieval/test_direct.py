"""Connections beside Ray: right answers, failures that are told apart, and nothing said to those without the key."""

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from retro_ray.retrieval.direct import LONGEST_REQUEST_BYTES, DirectCall, DirectLine, Endpoint, wait_for_ends
from retro_ray.retrieval.failover import Failure, FailureKind
from tests.unit.retrieval.direct_server import ServerProcess, running_server

LONG_S = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server() as running:
        yield running


def at_once(function: Callable[[], bool]) -> Future[bool]:
    """Called in the thread that asks."""
    done: Future[bool] = Future()
    done.set_result(function())
    return done


def line_to(endpoint: Endpoint | None) -> DirectLine:
    return DirectLine(lambda: endpoint, at_once)


def begin(line: DirectLine, message: bytes) -> DirectCall:
    """A call that finds no connection has one opened, for itself or another."""
    deadline = time.monotonic() + LONG_S
    while (call := line.send(message)) is None:
        assert time.monotonic() < deadline, "no connection"
        time.sleep(0.001)
    assert isinstance(call, DirectCall)
    return call


def ask(line: DirectLine, message: bytes) -> bytes | Failure | None:
    call = begin(line, message)
    wait_for_ends([call], LONG_S, all_of_them=True)
    return call.outcome


@pytest.mark.parametrize("size", [0, 1, 1000, 16_384, 16_385, 300_000, LONGEST_REQUEST_BYTES])
def test_messages_come_back_as_they_were(server: ServerProcess, size: int) -> None:
    message = os.urandom(size)
    assert ask(line_to(server.endpoint), message) == message


def test_a_connection_serves_many_calls_by_one_thread(server: ServerProcess) -> None:
    line = line_to(server.endpoint)
    assert line.send(b"thread") is None  # there is none yet
    first = ask(line, b"thread")
    assert [ask(line, b"thread") for _ in range(3)] == [first] * 3


def test_calls_at_the_same_time_have_connections_of_their_own(server: ServerProcess) -> None:
    line = line_to(server.endpoint)
    slow, quick = begin(line, b"slow 0.3"), begin(line, b"quick")
    wait_for_ends([slow, quick], LONG_S, all_of_them=False)
    assert (slow.outcome, quick.outcome) == (None, b"quick")
    wait_for_ends([slow, quick], LONG_S, all_of_them=True)
    assert slow.outcome == b"slow 0.3"


def test_time_runs_out(server: ServerProcess) -> None:
    call = begin(line_to(server.endpoint), b"slow 0.3")
    wait_for_ends([call], 0.01, all_of_them=True)
    assert call.outcome is None
    assert not call.has_ended()


def test_the_answer_to_a_call_that_was_given_up_is_nobody_elses(server: ServerProcess) -> None:
    line = line_to(server.endpoint)
    given_up = begin(line, b"slow 0.2")
    assert ask(line, b"another") == b"another"
    while not given_up.has_ended():
        time.sleep(0.01)
    assert given_up.outcome == b"slow 0.2"
    sent = [line.send(b"a"), line.send(b"b")]  # over both connections, which are free again
    calls = [call for call in sent if isinstance(call, DirectCall)]
    wait_for_ends(calls, LONG_S, all_of_them=True)
    assert [call.outcome for call in calls] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("message", "kind", "reason"),
    [
        (b"damaged", FailureKind.DAMAGED, "it cannot be loaded: keys.npy is not what it was"),
        (b"wrong", FailureKind.REFUSED, "the search failed: ValueError: no such thing"),
    ],
)
def test_what_answering_raises_is_told(server: ServerProcess, message: bytes, kind: FailureKind, reason: str) -> None:
    line = line_to(server.endpoint)
    assert ask(line, message) == Failure(kind, reason)
    assert ask(line, b"and on") == b"and on"


def test_one_failure_ends_the_waiting_for_all(server: ServerProcess) -> None:
    line = line_to(server.endpoint)
    slow, wrong = begin(line, b"slow 5"), begin(line, b"wrong")
    wait_for_ends([slow, wrong], LONG_S, all_of_them=True)
    assert isinstance(wrong.outcome, Failure)
    assert slow.outcome is None


def test_a_server_that_dies_ends_its_calls_at_once() -> None:
    with running_server() as server:
        line = line_to(server.endpoint)
        call = begin(line, b"slow 60")
        server.kill()
        wait_for_ends([call], LONG_S, all_of_them=True)
        assert isinstance(call.outcome, Failure)
        assert call.outcome.kind is FailureKind.AWAY
        assert line.send(b"more") is None


def test_a_server_that_has_died_while_nobody_asked_fails_a_call_at_once() -> None:
    with running_server() as server:
        line = line_to(server.endpoint)
        assert ask(line, b"first") == b"first"
        server.kill()
        failure = line.send(b"second")
        assert isinstance(failure, Failure)
        assert failure.kind is FailureKind.AWAY
        assert line.send(b"third") is None  # that much is known


def test_one_that_is_back_by_then_gets_the_call(server: ServerProcess) -> None:
    with running_server() as mortal:
        endpoints = [mortal.endpoint, server.endpoint]
        line = DirectLine(lambda: endpoints.pop(0), at_once)
        assert ask(line, b"first") == b"first"
        mortal.kill()
        call = line.send(b"second")
        assert isinstance(call, DirectCall)
        wait_for_ends([call], LONG_S, all_of_them=True)
        assert call.outcome == b"second"


def test_one_that_is_back_but_has_no_free_connection_gets_the_call_another_way() -> None:
    with running_server() as server:
        line = line_to(server.endpoint)
        assert ask(line, b"first") == b"first"
        server.kill()
        opened: Future[bool] = Future()
        opened.set_result(True)  # for another call, which has taken it
        line.open_another = lambda: opened
        assert line.send(b"second") is None


def test_without_the_key_nothing_is_answered(server: ServerProcess) -> None:
    other_key = dataclasses.replace(server.endpoint, key=bytes(32))
    line = line_to(other_key)
    assert (line.send(b"secret"), line.send(b"secret")) == (None, None)
    assert "key" not in repr(server.endpoint)
    # Not even to one who skips the handshake.
    with socket.create_connection((server.endpoint.host, server.endpoint.port), 5) as raw:
        raw.sendall(b"\0\0\0\6thread" * 3)
        received = b""
        try:
            while part := raw.recv(1000):
                received += part
        except ConnectionResetError:
            pass
    assert b"CHALLENGE" in received
    assert str(server.process.pid).encode() not in received
    assert ask(line_to(server.endpoint), b"thread") is not None


@pytest.mark.parametrize("size", [LONGEST_REQUEST_BYTES + 1, 50 * LONGEST_REQUEST_BYTES])
def test_a_request_that_is_far_too_long_is_not_taken_in(server: ServerProcess, size: int) -> None:
    """The connection is cut: before the shorter one has been sent, or after; the longer one is never sent whole."""
    line = line_to(server.endpoint)
    assert line.send(b"") is None
    outcome = line.send(bytes(size))
    if isinstance(outcome, DirectCall):
        wait_for_ends([outcome], LONG_S, all_of_them=True)
        outcome = outcome.outcome
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.AWAY
    assert ask(line_to(server.endpoint), b"as before") == b"as before"


def test_who_does_not_prove_the_key_is_not_waited_for(server: ServerProcess) -> None:
    with socket.create_connection((server.endpoint.host, server.endpoint.port), LONG_S) as silent:
        received = b""
        while part := silent.recv(1000):  # until the server ends it
            received += part
    assert b"CHALLENGE" in received


def test_nobody_there_is_not_asked_again_at_once() -> None:
    num_asked = 0

    def find() -> None:
        nonlocal num_asked
        num_asked += 1

    line = DirectLine(find, at_once)
    assert [line.send(b"") for _ in range(5)] == [None] * 5
    assert num_asked == 1


def test_many_threads(server: ServerProcess) -> None:
    line = line_to(server.endpoint)

    def ask_often(thread: int) -> bool:
        messages = [f"{thread} {number}".encode() for number in range(50)]
        return [ask(line, message) for message in messages] == messages

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask_often, range(8)))
