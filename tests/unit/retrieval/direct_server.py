"""A process that answers messages, to be killed."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from retro_ray.errors import DatabaseError
from retro_ray.retrieval.direct import DirectServer, Endpoint


@dataclass(frozen=True)
class ServerProcess:
    endpoint: Endpoint
    process: BaseProcess

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def running_server() -> Iterator[ServerProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    server = ServerProcess(ours.recv(), process)
    try:
        yield server
    finally:
        server.kill()


def _serve(tell: Connection) -> None:
    server = DirectServer("127.0.0.1", _answer)
    tell.send(server.endpoint)
    threading.Event().wait()


def _answer(message: bytes) -> bytes:
    """What the message asks for."""
    text = message.decode(errors="replace")
    if text == "damaged":
        raise DatabaseError("keys.npy is not what it was")
    if text == "wrong":
        raise ValueError("no such thing")
    if text == "thread":
        return f"{os.getpid()} {threading.get_ident()}".encode()
    if text.startswith("slow "):
        time.sleep(float(text.removeprefix("slow ")))
    return message
