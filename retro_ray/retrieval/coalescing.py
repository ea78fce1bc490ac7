"""Requests that arrive while a batch is being worked on are answered together, as the next batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Waiting(Generic[Request, Answer]):
    request: Request
    group: Hashable
    size: int
    future: Future[Answer]


class Coalescer(Generic[Request, Answer]):
    """Answers requests of many threads in one thread of its own, as few, large batches.

    Nothing is waited for: a request that finds the thread idle is a batch by itself. The thread is
    always the same one, since OpenMP keeps a team of threads, and a setting of how many, for each
    thread that calls it.

    Args:
        answer: answers the requests of one batch, in their order.
        group_of: requests of equal groups may share a batch.
        size_of: how much of a batch a request fills.
        max_batch_size: a batch holds no more, unless a single request does.
        prepare: called once in the thread, before the first batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Answer]],
        *,
        group_of: Callable[[Request], Hashable],
        size_of: Callable[[Request], int],
        max_batch_size: int,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._answer = answer
        self._group_of = group_of
        self._size_of = size_of
        self._max_batch_size = max_batch_size
        self._prepare = prepare
        self._waiting: deque[_Waiting[Request, Answer]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="retro-ray-batches", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> Future[Answer]:
        """Queue a request; the future gets its answer, or what answering it raised."""
        waiting: _Waiting[Request, Answer] = _Waiting(
            request, self._group_of(request), self._size_of(request), Future()
        )
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the coalescer is closed")
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Take nothing more; what is queued is still answered. Returns when that is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while batch := self._take():
            self._answer_batch(batch)

    def _take(self) -> list[_Waiting[Request, Answer]]:
        """The longest waiting request and what fits beside it, in order; nothing once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            batch: list[_Waiting[Request, Answer]] = []
            size = 0
            others: list[_Waiting[Request, Answer]] = []
            while self._waiting:
                waiting = self._waiting.popleft()
                fits = not batch or (waiting.group == batch[0].group and size + waiting.size <= self._max_batch_size)
                (batch if fits else others).append(waiting)
                size += waiting.size if fits else 0
            self._waiting.extend(others)
            return batch

    def _answer_batch(self, batch: list[_Waiting[Request, Answer]]) -> None:
        try:
            answers = self._answer([waiting.request for waiting in batch])
        except Exception as error:
            # One of them may be the cause: the others must not suffer for it.
            if len(batch) > 1:
                for waiting in batch:
                    self._answer_batch([waiting])
            else:
                batch[0].future.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)
