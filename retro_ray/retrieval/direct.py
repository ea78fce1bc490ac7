"""Small messages over connections of our own, which answer twenty times as fast as calls that Ray carries.

Ray starts the actors, finds them, and tells where each of them listens and the key that its clients prove
to have. Messages are bytes, and nothing of them is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait

from retro_ray.errors import DatabaseError
from retro_ray.retrieval.failover import Failure, FailureKind

logger = logging.getLogger(__name__)

LONGEST_REQUEST_BYTES = 1_000_000
"""Longer ones are a mistake, or somebody else's."""
_CONNECT_TIMEOUT_S = 5.0
_PAUSE_S = 1.0
"""Between attempts to connect, after one that failed."""
_GRACE_S = 0.2
"""For a new connection, where the old one is found to have ended."""
_LOST_AFTER_S = 20
"""Without a sign of life from the other machine, a connection ends."""
_ANSWER, _DAMAGED, _REFUSED = b"\0", b"\1", b"\2"


@dataclass(frozen=True)
class Endpoint:
    """Where a DirectServer listens, for those who may ask it."""

    host: str
    port: int
    key: bytes = field(repr=False)


class DirectServer:
    """Answers messages, those of each connection in a thread of its own, until the process ends.

    Args:
        host: address to listen at.
        answer: from a message to its answer; what it raises reaches the client as a Failure.
    """

    def __init__(self, host: str, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self._socket = socket.create_server((host, 0))
        self.endpoint = Endpoint(host, self._socket.getsockname()[1], secrets.token_bytes(32))
        threading.Thread(target=self._accept, name="retro-ray-accepting", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError as error:  # too many open files, for instance
                logger.warning("no connection can be accepted: %s", error)
                time.sleep(_PAUSE_S)
                continue
            threading.Thread(target=self._serve, args=(accepted,), name="retro-ray-answering", daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        try:
            with accepted, _as_connection(accepted.dup()) as connection:
                patience = threading.Timer(_CONNECT_TIMEOUT_S, _shut, [accepted])
                patience.daemon = True
                patience.start()
                try:
                    deliver_challenge(connection, self.endpoint.key)
                    answer_challenge(connection, self.endpoint.key)
                finally:
                    patience.cancel()
                while True:
                    connection.send_bytes(self._reply(connection.recv_bytes(LONGEST_REQUEST_BYTES)))
        except AuthenticationError:
            logger.warning("somebody without the key tried to connect")
        except (EOFError, OSError):
            pass  # the client is gone, or has not proved the key in time

    def _reply(self, message: bytes) -> bytes:
        try:
            return _ANSWER + self._answer(message)
        except DatabaseError as error:
            return _DAMAGED + _one_line(error)
        except Exception as error:
            logger.exception("a search failed")
            return _REFUSED + f"{type(error).__name__}: ".encode() + _one_line(error)


class DirectCall:
    """A message on its way, and what becomes of it. For one thread at a time."""

    def __init__(self, connection: Connection, line: DirectLine) -> None:
        self.connection = connection
        self.outcome: bytes | Failure | None = None
        """None if it has not ended, or nobody has looked."""
        self._line = line

    def has_ended(self) -> bool:
        """Whether an answer or a failure is there by now."""
        if self.outcome is None and self.connection.poll(0):
            self.take_in()
        return self.outcome is not None

    def take_in(self) -> None:
        """Wait for the end; the connection is free for the next call then."""
        try:
            self.outcome = _read(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            self.connection.close()
            self.outcome = Failure(FailureKind.AWAY, "its actor died: the connection ended", error)
        else:
            self._line.take_back(self.connection)


class DirectLine:
    """Connections to one server, as many as there are calls at the same time. Any number of threads may use it.

    They are opened in the background: until there is a free one, calls have to go another way.

    Args:
        find: says where the server listens, however long that takes; None if it cannot be found out.
        start: has a function called in another thread.
    """

    def __init__(
        self, find: Callable[[], Endpoint | None], start: Callable[[Callable[[], bool]], Future[bool]]
    ) -> None:
        self._find = find
        self._start = start
        self._free: deque[Connection] = deque()
        self._lock = threading.Lock()
        self._opening: Future[bool] | None = None
        self._not_before = 0.0

    def send(self, message: bytes) -> DirectCall | Failure | None:
        """Begin a call.

        Returns:
            None where no connection is free; a failure where there was one, and the server has died since.
        """
        call, was_open = self._send(message)
        if call is not None:
            return call
        opening = self.open_another()
        if not was_open:
            return None
        # It may have died long ago, and have been started again.
        if opening is not None and futures.wait([opening], timeout=_GRACE_S).done and opening.result():
            call, was_open = self._send(message)
            if call is not None or not was_open:
                return call
        return Failure(FailureKind.AWAY, "its actor died: the connection ended", EOFError())

    def take_back(self, connection: Connection) -> None:
        """A call has ended."""
        self._free.append(connection)

    def open_another(self) -> Future[bool] | None:
        """Open one more connection; what is returned tells when it is there, or cannot be. None: not so soon again."""
        with self._lock:
            if self._opening is None or self._opening.done():
                if time.monotonic() < self._not_before:
                    return None
                self._opening = self._start(self._open)
            return self._opening

    def _send(self, message: bytes) -> tuple[DirectCall | None, bool]:
        """A call over a free connection, and whether there was any, if only one that had ended."""
        was_open = False
        with contextlib.suppress(IndexError):  # none is left
            while True:
                connection = self._free.pop()
                was_open = True
                with contextlib.suppress(OSError):
                    if not connection.poll(0):  # there is nothing to be read before a question but the end
                        connection.send_bytes(message)
                        return DirectCall(connection, self), True
                connection.close()
        return None, was_open

    def _open(self) -> bool:
        self._not_before = time.monotonic() + _PAUSE_S
        endpoint = self._find()
        if endpoint is None:
            return False
        try:
            self._free.append(_connect(endpoint))
        except (OSError, EOFError, AuthenticationError) as error:
            logger.info("no direct connection, calls go through Ray: %s", error)
            return False
        self._not_before = 0.0
        return True


def wait_for_ends(calls: Sequence[DirectCall], timeout_s: float, *, all_of_them: bool) -> None:
    """Returns when all calls have ended (or, unless `all_of_them`, when any has), when one has failed, or after
    `timeout_s`.
    """
    open_calls = {call.connection: call for call in calls if call.outcome is None}
    has_enough = not all_of_them and len(open_calls) < len(calls)
    deadline = time.monotonic() + timeout_s
    while open_calls and not has_enough:
        readable = wait(list(open_calls), max(0.0, deadline - time.monotonic()))
        if not readable:
            return
        for connection in readable:
            call = open_calls.pop(connection)  # pyright: ignore[reportArgumentType]  # nothing else was waited for
            call.take_in()
            has_enough = has_enough or not all_of_them or isinstance(call.outcome, Failure)


def _one_line(error: Exception) -> bytes:
    return " ".join(str(error).split()).encode()


def _read(reply: bytes) -> bytes | Failure:
    kind, content = reply[:1], reply[1:]
    if kind == _ANSWER:
        return content
    text = content.decode(errors="replace")
    if kind == _DAMAGED:
        return Failure(FailureKind.DAMAGED, f"it cannot be loaded: {text}")
    return Failure(FailureKind.REFUSED, f"the search failed: {text}")


def _connect(endpoint: Endpoint) -> Connection:
    connection = _as_connection(socket.create_connection((endpoint.host, endpoint.port), _CONNECT_TIMEOUT_S))
    try:
        if not connection.poll(_CONNECT_TIMEOUT_S):
            raise TimeoutError(f"nobody answers at {endpoint.host}:{endpoint.port}")
        answer_challenge(connection, endpoint.key)
        deliver_challenge(connection, endpoint.key)
    except (OSError, EOFError, AuthenticationError):
        connection.close()
        raise
    return connection


def _shut(opened: socket.socket) -> None:
    """Whoever waits for something to be read from it is told that nothing will come."""
    with contextlib.suppress(OSError):  # it has ended
        opened.shutdown(socket.SHUT_RDWR)


def _as_connection(opened: socket.socket) -> Connection:
    """With messages in place of a stream of bytes; sent at once, and ended when the other machine is gone."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _LOST_AFTER_S // 2),
        ("TCP_KEEPINTVL", _LOST_AFTER_S // 4),
        ("TCP_USER_TIMEOUT", _LOST_AFTER_S * 1000),
    ):
        if hasattr(socket, name):  # Linux has them all
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    opened.settimeout(None)
    return Connection(opened.detach())
