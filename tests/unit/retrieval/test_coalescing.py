"""What waits is answered together, each request with its own answer."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from retro_ray.retrieval.coalescing import Coalescer

Request = tuple[str, int, str]


class Worker:
    """Answers a request (group, size, name) by its name; holds every batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.num_at_work = 0
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)

    def answer(self, requests: Sequence[Request]) -> list[str]:
        self.num_at_work += 1
        assert self.num_at_work == 1, "two batches at a time"
        self.batches.append([name for _, _, name in requests])
        self.begun.release()
        assert self.let_go.acquire(timeout=30)
        self.num_at_work -= 1
        if any(name == "bad" for _, _, name in requests):
            raise ValueError("a bad request")
        return [f"answer to {name}" for _, _, name in requests]


class Clients:
    """Threads that ask."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.coalescer: Coalescer[Request, str] = Coalescer(
            worker.answer, group_of=lambda request: request[0], size_of=lambda request: request[1], max_batch_size=10
        )
        self.pool = ThreadPoolExecutor(16)

    def hold_one(self) -> Future[str]:
        """Ask for what is being worked on from now until it is let go."""
        held = self.pool.submit(self.coalescer.answer, ("g", 1, "first"))
        assert self.worker.begun.acquire(timeout=30)
        return held

    def ask(self, request: Request) -> Future[str]:
        """Ask while something is being worked on; returns once the request waits."""
        before = self.coalescer.num_waiting
        future = self.pool.submit(self.coalescer.answer, request)
        deadline = time.monotonic() + 30
        while self.coalescer.num_waiting == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return future


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def clients(worker: Worker) -> Iterator[Clients]:
    clients = Clients(worker)
    yield clients
    worker.let_go.release(100)
    clients.pool.shutdown()


def test_one_request_is_answered_in_its_own_thread(worker: Worker) -> None:
    threads = []

    def answer(requests: Sequence[int]) -> list[int]:
        threads.append(threading.get_ident())
        return [2 * request for request in requests]

    coalescer = Coalescer(answer, group_of=lambda _: 0, size_of=lambda _: 1, max_batch_size=10)
    assert coalescer.answer(4) == 8
    assert threads == [threading.get_ident()]


def test_what_waits_meanwhile_is_one_batch(worker: Worker, clients: Clients) -> None:
    held = clients.hold_one()
    others = [clients.ask(("g", 3, name)) for name in "abc"]
    worker.let_go.release(2)
    assert [future.result(30) for future in (held, *others)] == [f"answer to {name}" for name in ("first", *"abc")]
    assert worker.batches == [["first"], ["a", "b", "c"]]
    assert clients.coalescer.num_waiting == 0


def test_batches_are_of_one_group_and_bounded(worker: Worker, clients: Clients) -> None:
    clients.hold_one()
    waiting = [("g", 6, "a"), ("h", 2, "b"), ("g", 4, "c"), ("g", 1, "d"), ("h", 40, "e"), ("h", 1, "f")]
    futures = [clients.ask(request) for request in waiting]
    worker.let_go.release(10)
    assert [future.result(30) for future in futures] == [f"answer to {name}" for name in "abcdef"]
    assert worker.batches == [["first"], ["a", "c"], ["b", "f"], ["d"], ["e"]]


def test_a_bad_request_fails_alone(worker: Worker, clients: Clients) -> None:
    clients.hold_one()
    futures = {name: clients.ask(("g", 1, name)) for name in ("a", "bad", "b")}
    worker.let_go.release(10)
    assert futures["a"].result(30) == "answer to a"
    assert futures["b"].result(30) == "answer to b"
    with pytest.raises(ValueError, match="a bad request"):
        futures["bad"].result(30)
    assert clients.coalescer.answer(("g", 1, "later")) == "answer to later"


def test_many_threads_get_their_own_answers(worker: Worker, clients: Clients) -> None:
    worker.let_go.release(1000)
    futures = [clients.pool.submit(clients.coalescer.answer, ("g", 1 + i % 3, str(i))) for i in range(200)]
    assert [future.result(30) for future in futures] == [f"answer to {i}" for i in range(200)]
    assert sorted(name for batch in worker.batches for name in batch) == sorted(map(str, range(200)))
