"""What waits is answered together, each request with its own answer."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from retro_ray.retrieval.coalescing import Coalescer


class Worker:
    """Answers a request (group, size, name) by its name; holds every batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)

    def answer(self, requests: Sequence[tuple[str, int, str]]) -> list[str]:
        self.threads.add(threading.get_ident())
        self.batches.append([name for _, _, name in requests])
        self.begun.release()
        assert self.let_go.acquire(timeout=30)
        if any(name == "bad" for _, _, name in requests):
            raise ValueError("a bad request")
        return [f"answer to {name}" for _, _, name in requests]


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def coalescer(worker: Worker) -> Coalescer[tuple[str, int, str], str]:
    return Coalescer(
        worker.answer, group_of=lambda request: request[0], size_of=lambda request: request[1], max_batch_size=10
    )


def hold_one(worker: Worker, coalescer: Coalescer) -> Future[str]:
    """Submit a request that is being worked on from now until it is let go."""
    held = coalescer.submit(("g", 1, "first"))
    assert worker.begun.acquire(timeout=30)
    return held


def test_what_waits_meanwhile_is_one_batch(worker: Worker, coalescer: Coalescer) -> None:
    held = hold_one(worker, coalescer)
    others = [coalescer.submit(("g", 3, name)) for name in "abc"]
    assert coalescer.num_waiting == 3
    worker.let_go.release(2)
    assert [future.result(30) for future in (held, *others)] == [f"answer to {name}" for name in ("first", *"abc")]
    assert worker.batches == [["first"], ["a", "b", "c"]]
    assert coalescer.num_waiting == 0


def test_batches_are_of_one_group_and_bounded(worker: Worker, coalescer: Coalescer) -> None:
    hold_one(worker, coalescer)
    waiting = [("g", 6, "a"), ("h", 2, "b"), ("g", 4, "c"), ("g", 1, "d"), ("h", 40, "e"), ("h", 1, "f")]
    futures = [coalescer.submit(request) for request in waiting]
    worker.let_go.release(10)
    assert [future.result(30) for future in futures] == [f"answer to {name}" for name in "abcdef"]
    assert worker.batches == [["first"], ["a", "c"], ["b", "f"], ["d"], ["e"]]


def test_a_bad_request_fails_alone(worker: Worker, coalescer: Coalescer) -> None:
    hold_one(worker, coalescer)
    futures = {name: coalescer.submit(("g", 1, name)) for name in ("a", "bad", "b")}
    worker.let_go.release(10)
    assert futures["a"].result(30) == "answer to a"
    assert futures["b"].result(30) == "answer to b"
    with pytest.raises(ValueError, match="a bad request"):
        futures["bad"].result(30)
    assert coalescer.submit(("g", 1, "later")).result(30) == "answer to later"


def test_all_batches_run_in_one_prepared_thread() -> None:
    worker, prepared = Worker(), []
    worker.let_go.release(100)
    coalescer = Coalescer(
        worker.answer,
        group_of=lambda request: request[0],
        size_of=lambda request: request[1],
        max_batch_size=1,
        prepare=lambda: prepared.append(threading.get_ident()),
    )
    threads = [threading.Thread(target=lambda: coalescer.submit(("g", 1, "x")).result(30)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worker.batches) == 8
    assert [*worker.threads] == prepared


def test_closing_answers_what_is_queued(worker: Worker, coalescer: Coalescer) -> None:
    held = hold_one(worker, coalescer)
    queued = coalescer.submit(("g", 1, "queued"))
    worker.let_go.release(2)
    coalescer.close()
    assert held.done()
    assert queued.result(0) == "answer to queued"
    with pytest.raises(RuntimeError, match="closed"):
        coalescer.submit(("g", 1, "late"))
