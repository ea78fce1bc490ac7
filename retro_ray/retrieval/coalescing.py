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


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Request, Answer]):
    request: Request
    group: Hashable
    size: int
    future: Future[Answer]


class Coalescer(Generic[Request, Answer]):
    """Answers requests of many threads, one batch at a time, as few, large batches.

    Nothing is waited for, and there is no thread that would have to be woken: the thread of a request
    that finds nobody working answers it, and with it what waits beside it.

    Args:
        answer: answers the requests of one batch, in their order.
        group_of: requests of equal groups may share a batch.
        size_of: how much of a batch a request fills.
        max_batch_size: a batch holds no more, unless a single request does.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Answer]],
        *,
        group_of: Callable[[Request], Hashable],
        size_of: Callable[[Request], int],
        max_batch_size: int,
    ) -> None:
        self._answer = answer
        self._group_of = group_of
        self._size_of = size_of
        self._max_batch_size = max_batch_size
        self._waiting: deque[_Waiting[Request, Answer]] = deque()
        self._is_working = threading.Lock()

    @property
    def num_waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def answer(self, request: Request) -> Answer:
        """The answer to a request, or what answering it raised."""
        own: _Waiting[Request, Answer] = _Waiting(request, self._group_of(request), self._size_of(request), Future())
        self._waiting.append(own)
        while not own.future.done():
            with self._is_working:
                if not own.future.done():
                    self._answer_batch(self._take())
        return own.future.result()

    def _take(self) -> list[_Waiting[Request, Answer]]:
        """The longest waiting request and what fits beside it, in order."""
        batch: list[_Waiting[Request, Answer]] = []
        size = 0
        for waiting in list(self._waiting):  # more may come meanwhile
            if not batch or (waiting.group == batch[0].group and size + waiting.size <= self._max_batch_size):
                self._waiting.remove(waiting)
                batch.append(waiting)
                size += waiting.size
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
