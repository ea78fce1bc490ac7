"""Neighbours are retrieved in a thread of their own, so that sequences that need none decode on.

It computes alone: the processors are for decoding.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.neighbours import ChunkQuery, RetrievedChunk
from retro_ray.openmp import computing_alone

MAX_QUERIES_PER_CALL = 32
"""Unless one prompt has more: long prompts that came together are retrieved one after another, so
that a sequence whose decoding has stopped need not wait for all of them."""


@dataclass(frozen=True)
class Fetch:
    """Chunks of one sequence whose neighbours are wanted."""

    owner: object
    """Whose they are; the fetcher does not look at it."""
    queries: tuple[ChunkQuery, ...]


Outcome = tuple[Fetch, list[RetrievedChunk] | Exception]


class NeighbourFetcher:
    """Retrieves for many sequences, those that wait at the same time in one call.

    Args:
        engine: whose retriever to ask.
        deliver: told, in the fetcher's thread, of what came of each call and of the seconds it took.
    """

    def __init__(self, engine: GenerationEngine, deliver: Callable[[list[Outcome], float], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._urgent: deque[Fetch] = deque()
        self._others: deque[Fetch] = deque()
        self._was_urgent = False
        self._is_closed = False
        self._condition = threading.Condition()
        threading.Thread(target=self._run, name="retro-ray-neighbours", daemon=True).start()

    def ask(self, fetches: Sequence[Fetch], *, urgent: bool) -> None:
        """Retrieve for `fetches`. Urgent are those for which decoding has stopped; they take turns
        with the others.
        """
        with self._condition:
            (self._urgent if urgent else self._others).extend(fetches)
            self._condition.notify()

    def close(self) -> None:
        """Retrieve nothing more; what is on its way is still delivered."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()

    @computing_alone()
    def _run(self) -> None:
        while fetches := self._take():
            start = time.monotonic()
            outcomes = self._fetch(fetches)
            self._deliver(outcomes, time.monotonic() - start)

    def _take(self) -> list[Fetch]:
        """What the next call retrieves for, at least one; nothing once closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._urgent or self._others or self._is_closed)
            if self._is_closed:
                return []
            self._was_urgent = bool(self._urgent) and not (self._was_urgent and self._others)
            waiting = self._urgent if self._was_urgent else self._others
            taken = [waiting.popleft()]
            num_queries = len(taken[0].queries)
            while waiting and num_queries + len(waiting[0].queries) <= MAX_QUERIES_PER_CALL:
                taken.append(waiting.popleft())
                num_queries += len(taken[-1].queries)
            return taken

    def _fetch(self, fetches: Sequence[Fetch]) -> list[Outcome]:
        try:
            found = iter(self._engine.retrieve([query for fetch in fetches for query in fetch.queries]))
        except Exception as error:
            if len(fetches) == 1:
                return [(fetches[0], error)]
            # One of them may be the cause: the others must not suffer for it.
            return [outcome for fetch in fetches for outcome in self._fetch([fetch])]
        return [(fetch, [next(found) for _ in fetch.queries]) for fetch in fetches]
