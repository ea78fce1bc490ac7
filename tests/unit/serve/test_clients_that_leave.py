"""Real sockets: clients that leave in the middle, and more of them than there is room for."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from retro_ray.serve.api import build_api
from retro_ray.serve.replica import Replica
from tests.unit.serve.tiny_replica import listening, new_replica, wait_until, write_home

FOR_EVER = {"prompt": "alpha", "max_tokens": 30_000, "temperature": 0}
"""Longer than any test waits."""


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Replica:
    home = tmp_path_factory.mktemp("home")
    write_home(home, num_chunks=8000)
    return new_replica(home, max_batch_size=2, max_queued=2)


@pytest.fixture(scope="module")
def port(replica: Replica) -> Iterator[int]:
    with listening(build_api(replica)) as port:
        yield port


@contextmanager
def asking(port: int, **body) -> Iterator[socket.socket]:
    """A connection on which a completion has been asked for; closed at the end of the block."""
    content = json.dumps({**FOR_EVER, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    received = b""
    while wanted not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


def is_idle(replica: Replica) -> bool:
    stats = replica._scheduler.stats()
    return stats.active == stats.queued == 0


def test_a_client_that_closes_its_socket_in_mid_stream_frees_its_slot(replica: Replica, port: int) -> None:
    with asking(port, stream=True) as connection:
        received = read_until(connection, b'"text":"')
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert replica._scheduler.stats().active == 1
    wait_until(lambda: is_idle(replica))


@pytest.mark.parametrize("n", [1, 2])
def test_so_does_one_that_waits_for_a_whole_answer(replica: Replica, port: int, n: int) -> None:
    with asking(port, n=n):
        wait_until(lambda: replica._scheduler.stats().active == n)
    wait_until(lambda: is_idle(replica))


def test_so_does_one_that_waits_in_the_queue(replica: Replica, port: int) -> None:
    with asking(port, n=2):
        wait_until(lambda: replica._scheduler.stats().active == 2)
        with asking(port, n=2, stream=True):
            wait_until(lambda: replica._scheduler.stats().queued == 2)
        wait_until(lambda: replica._scheduler.stats().queued == 0)
        assert replica._scheduler.stats().active == 2
    wait_until(lambda: is_idle(replica))


@pytest.mark.parametrize("stream", [False, True])
def test_what_finds_no_room_is_refused_at_once_and_told_when_to_come_back(
    replica: Replica, port: int, stream: bool
) -> None:
    with ExitStack() as stack:
        stack.enter_context(asking(port, n=2))
        wait_until(lambda: replica._scheduler.stats().active == 2)
        stack.enter_context(asking(port))
        wait_until(lambda: replica._scheduler.stats().queued == 1)
        # All of a request or nothing: the one of its choices that there is room for does not stay behind.
        with asking(port, n=2, stream=stream) as connection:
            read_until(connection, b'"code":"overloaded"')
        wait_until(lambda: replica._scheduler.stats().queued == 1)
        stack.enter_context(asking(port))
        wait_until(lambda: replica._scheduler.stats().queued == 2)
        with asking(port, stream=stream) as connection:
            received = read_until(connection, b'"code":"overloaded"').decode().lower()
        assert received.startswith("http/1.1 503 service unavailable")
        assert "\r\nretry-after: " in received
    wait_until(lambda: is_idle(replica))


def test_a_deadline_ends_a_stream_with_an_error_event(replica: Replica, port: int) -> None:
    with asking(port, stream=True, deadline_s=0.5) as connection:
        received = read_until(connection, b'"code":"deadline_exceeded"')
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b"[DONE]" not in received
    wait_until(lambda: is_idle(replica))
