"""Continuous batching: requests join and leave the batch between two steps. Plain threads; knows no Ray.

One thread decodes, another one retrieves neighbours; requests come from, and events go to, any
asyncio loop. A request is first *queued*, while the neighbours of its prompt's chunks are fetched,
then *active* in a batch until it is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from retro_ray.errors import DeadlineError, OverloadedError, PromptError
from retro_ray.generation.batch import DecodingBatch, slot_size
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import Finished, GenerationEvent
from retro_ray.generation.fetcher import Fetch, NeighbourFetcher
from retro_ray.generation.neighbours import RetrievedChunk
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sequence import SequenceState
from retro_ray.generation.stats import Counters, SchedulerStats

MAX_PREFILL_TOKENS = 2048
"""Of the prompts, padded, that are read in one pass if they are several: between two passes, the
sequences that are being decoded take a step."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """A request inside the scheduler, and the way of its events to the one who asked."""

    engine: GenerationEngine
    state: SequenceState
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[GenerationEvent | Exception] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    was_asked_for: bool = False
    """The neighbours of its prompt are on their way, or there."""
    is_given_up: bool = False
    """By the client."""
    is_over: bool = False
    """Finished, failed or given up, and no longer in the scheduler."""

    @property
    def deadline(self) -> float:
        """By time.monotonic."""
        deadline_s = self.state.request.deadline_s
        return math.inf if deadline_s is None else self.submitted + deadline_s

    @property
    def is_ready(self) -> bool:
        """Whether its prompt can be read."""
        return self.was_asked_for and not self.state.is_waiting

    def post(self, *items: GenerationEvent | Exception) -> None:
        for item in items:
            try:
                self.loop.call_soon_threadsafe(self.events.put_nowait, item)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.is_given_up = True


class GenerationScheduler:
    """Decodes requests together as they come.

    Args:
        engine: model, tokenizer and retriever.
        max_batch_size: requests decoded together at most.
        max_cached_tokens: tokens that the KV cache may have memory for, prompts and what is generated
            together; requests that do not fit wait. Neighbours count too, by the layers that keep
            them. Default: `max_batch_size` sequences of the model's whole context.
        max_queued: requests that may wait; more are refused.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        *,
        max_batch_size: int = 8,
        max_cached_tokens: int | None = None,
        max_queued: int = 64,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_queued = max_queued
        context_length = engine.model.config.context_length
        whole_context = slot_size(engine.model.config, context_length, engine.model.config.num_neighbours)
        self._max_cached_tokens = max_cached_tokens or max_batch_size * whole_context
        # The condition guards what several threads write.
        self._condition = threading.Condition()
        self._engine = engine
        self._queue: list[_Ticket] = []
        self._answers: list[tuple[Fetch, list[RetrievedChunk] | Exception]] = []
        self._has_news = False
        self._is_closing = False
        self._is_closed = False
        # What follows is written by the decoding thread alone.
        self._active: dict[SequenceState, _Ticket] = {}
        self._batches: dict[GenerationEngine, DecodingBatch] = {}
        """One, but while requests in progress finish on an engine that has been replaced."""
        self._counters = Counters()
        self._mean_request_s = 1.0
        self._fetcher = NeighbourFetcher(self._on_retrieved)
        self._thread = threading.Thread(target=self._run, name="retro-ray-decoding", daemon=True)
        self._thread.start()

    # What the asyncio side calls.

    def check(self, request: GenerationRequest) -> None:
        """Raises PromptError if `request` can never be served."""
        self._start(request)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """The events of `request` as they come, Finished last.

        To close the generator, or to cancel the task that reads it, is to give the request up: its
        slot is free before the next step.

        Raises:
            PromptError: it can never be served.
            OverloadedError: too many wait already, or the scheduler is closing.
            RetrievalError: neighbours could not be retrieved.
            DeadlineError: its deadline has passed.
            RuntimeError: decoding failed.
        """
        ticket = self._submit(request)
        try:
            while True:
                item = await ticket.events.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            ticket.is_given_up = True
            self._wake()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """The answer to `request`; raises as `stream` does."""
        async with contextlib.aclosing(self.stream(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise AssertionError("a stream ends with Finished or an error")

    def stats(self) -> SchedulerStats:
        counters, retrieval_s = self._counters, self._fetcher.busy_s
        hidden_s = max(0.0, retrieval_s - counters.stalled_s)
        return SchedulerStats(
            queued=len(self._queue),
            active=len(self._active),
            cached_tokens=sum(batch.num_cached_tokens for batch in list(self._batches.values())),
            max_cached_tokens=self._max_cached_tokens,
            requests_finished=counters.requests_finished,
            requests_failed=counters.requests_failed,
            prompt_tokens=counters.prompt_tokens,
            tokens_generated=counters.tokens_generated,
            prefill_s=counters.prefill_s,
            decode_s=counters.decode_s,
            num_steps=counters.num_steps,
            batch_size_sum=counters.batch_size_sum,
            retrieval_s=retrieval_s,
            retrieval_hidden_share=hidden_s / retrieval_s if retrieval_s else 0.0,
            missing_shards=tuple(sorted(counters.missing_shards.copy())),
            partial_answers=counters.partial_answers,
        )

    def replace_engine(self, engine: GenerationEngine) -> None:
        """Serve requests that come from now on with `engine`; those that are here finish on theirs."""
        with self._condition:
            self._engine = engine

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, and return when all are finished, or `drain_s` have passed.

        What is then being decoded ends as it is, with finish_reason `cancelled`; what is still queued
        ends with an OverloadedError.
        """
        with self._condition:
            self._is_closing = True
            self._condition.wait_for(lambda: not self._queue and not self._active, timeout=drain_s)
            self._is_closed = True
        self._wake()
        self._thread.join()
        self._fetcher.close()

    def _submit(self, request: GenerationRequest) -> _Ticket:
        engine, state = self._start(request)
        ticket = _Ticket(engine, state, asyncio.get_running_loop())
        with self._condition:
            if self._is_closing:
                raise OverloadedError("this service is shutting down: ask again in a moment")
            if len(self._queue) >= self._max_queued:
                rounds = (len(self._queue) + 1) / self._max_batch_size
                raise OverloadedError(
                    f"{len(self._queue)} requests wait already, max_queued is {self._max_queued}: ask again later",
                    retry_after_s=max(1.0, rounds * self._mean_request_s),
                )
            self._queue.append(ticket)
        self._wake()
        return ticket

    def _start(self, request: GenerationRequest) -> tuple[GenerationEngine, SequenceState]:
        engine = self._engine
        state = engine.start(request)
        size = slot_size(engine.model.config, state.max_length, state.num_neighbours)
        if size > self._max_cached_tokens:
            raise PromptError(
                f"{state.max_length} tokens with {state.num_neighbours} neighbours per chunk take the memory of "
                f"{size} tokens, max_cached_tokens is {self._max_cached_tokens}: shorten the prompt, lower max_tokens "
                "or num_neighbours"
            )
        return engine, state

    def _wake(self) -> None:
        with self._condition:
            self._has_news = True
            self._condition.notify_all()

    def _on_retrieved(self, fetch: Fetch, outcome: list[RetrievedChunk] | Exception) -> None:
        with self._condition:
            self._answers.append((fetch, outcome))
        self._wake()

    # The decoding thread.

    def _run(self) -> None:
        has_progressed = False
        while not self._is_closed:
            if not has_progressed:
                self._wait()
            try:
                has_progressed = self._turn()
            except Exception as error:
                logger.exception("decoding failed; the requests in progress end with an error")
                self._end_all(error)
        self._end_all(None)

    def _wait(self) -> None:
        """Until something happens outside, or a deadline passes."""
        with self._condition:
            tickets = [*self._queue, *self._active.values()]
            start = time.monotonic()
            first_deadline = min((ticket.deadline for ticket in tickets), default=math.inf)
            time_left_s = None if first_deadline == math.inf else max(0.0, first_deadline - start)
            self._condition.wait_for(lambda: self._has_news, timeout=time_left_s)
            self._has_news = False
        if tickets:
            self._counters.stalled_s += time.monotonic() - start

    def _turn(self) -> bool:
        """Everything that can be done now, a step at most; False if there was nothing to decode."""
        with self._condition:
            answers, self._answers = self._answers, []
        self._take_in(answers)
        self._drop_given_up()
        self._ask_for_prompts()
        has_admitted = self._admit()
        return self._step() or has_admitted

    def _take_in(self, answers: Sequence[tuple[Fetch, list[RetrievedChunk] | Exception]]) -> None:
        """What was retrieved goes to those who wait for it, and what failed, too."""
        for fetch, outcome in answers:
            ticket = fetch.owner
            if not isinstance(ticket, _Ticket) or ticket.is_over:
                continue
            if isinstance(outcome, Exception):
                self._end(ticket, outcome)
                continue
            ticket.state.retrieved += outcome
            for retrieved in outcome:
                self._counters.missing_shards.update(retrieved.neighbours.missing_shards)
                self._counters.partial_answers += bool(retrieved.neighbours.missing_shards)

    def _drop_given_up(self) -> None:
        now = time.monotonic()
        for ticket in [*self._queue, *self._active.values()]:
            if ticket.is_given_up:
                self._end(ticket)
            elif now >= ticket.deadline:
                done, wanted = len(ticket.state.generated), ticket.state.request.max_tokens
                self._end(
                    ticket,
                    DeadlineError(
                        f"deadline_s = {ticket.state.request.deadline_s:g} passed after {done} of {wanted} tokens: "
                        "raise it, or lower max_tokens"
                    ),
                )

    def _ask_for_prompts(self) -> None:
        """Neighbours for the prompts that are next in the queue."""
        fetches = []
        for ticket in self._queue[: 2 * self._max_batch_size]:
            if not ticket.was_asked_for:
                ticket.was_asked_for = True
                fetches += self._fetches(ticket)
        self._fetcher.ask(fetches, urgent=False)

    def _admit(self) -> bool:
        """Read the next prompts, if there are any that fit."""
        for engine, batch in list(self._batches.items()):
            if engine is not self._engine:
                batch.release()
            if engine is not self._engine and not batch.active:
                del self._batches[engine]
        group = self._next_prompts()
        if not group:
            return False
        batch = self._batch_of(group[0].engine)
        states = [ticket.state for ticket in group]
        with self._condition:
            self._active |= zip(states, group, strict=True)
            self._queue = [ticket for ticket in self._queue if ticket not in group]
        start = time.monotonic()
        batch.admit(states, self._memory_for(batch))
        self._counters.prefill_s += time.monotonic() - start
        self._counters.prompt_tokens += sum(state.num_prompt_tokens for state in states)
        self._counters.tokens_generated += sum(len(state.generated) for state in states)
        self._tell(states)
        return True

    def _next_prompts(self) -> list[_Ticket]:
        """Those that are read in one pass: the first that is ready, and others of about its length."""
        group: list[_Ticket] = []
        for ticket in list(self._queue):
            if not ticket.is_ready or (group and not _goes_with(group, ticket)):
                continue
            batch = self._batch_of(ticket.engine)
            states = [other.state for other in (*group, ticket)]
            is_full = len(self._active) + len(states) > self._max_batch_size
            if is_full or not batch.fits(states, self._memory_for(batch)):
                break  # nobody overtakes the first that does not fit, or it might wait for ever
            group.append(ticket)
        return group

    def _step(self) -> bool:
        """One step of every batch."""
        has_stepped = False
        for batch in list(self._batches.values()):
            start = time.monotonic()
            produced = batch.step()
            if produced:
                self._counters.decode_s += time.monotonic() - start
                self._counters.num_steps += 1
                self._counters.batch_size_sum += len(produced)
                self._counters.tokens_generated += len(produced)
                self._tell(produced)
                has_stepped = True
        return has_stepped

    def _tell(self, states: Sequence[SequenceState]) -> None:
        """Send what is new of `states`, end those that are finished, and ask for the others' neighbours."""
        fetches = []
        for state in states:
            ticket = self._active[state]
            ticket.post(*state.take_events())
            if state.finish_reason is None:
                fetches += self._fetches(ticket)
            else:
                self._end(ticket)
                ticket.post(Finished(result=state.result()))
        self._fetcher.ask(fetches, urgent=True)

    def _end(self, ticket: _Ticket, error: Exception | None = None) -> None:
        """Nothing more is done for `ticket`."""
        ticket.is_over = True
        if error is not None:
            ticket.post(error)
        if ticket.state.finish_reason is None:
            self._counters.requests_failed += 1
            batch = self._batches.get(ticket.engine)
            if batch is not None and ticket.state in batch.active:
                batch.remove(ticket.state)
        else:
            self._counters.requests_finished += 1
            self._mean_request_s += 0.1 * (time.monotonic() - ticket.submitted - self._mean_request_s)
        with self._condition:
            self._active.pop(ticket.state, None)
            self._queue = [other for other in self._queue if other is not ticket]
            self._condition.notify_all()

    def _end_all(self, cause: Exception | None) -> None:
        """With an error; or, where there is none, because the scheduler closes."""
        self._batches.clear()
        for ticket in [*self._active.values(), *self._queue]:
            error: Exception | None = None
            if cause is not None:
                error = RuntimeError(f"decoding failed ({type(cause).__name__}); the log has the cause")
                error.__cause__ = cause
            elif ticket.state not in self._active:
                error = OverloadedError("this service shut down before the request's turn came: ask again in a moment")
            else:
                ticket.state.finish("cancelled")
                ticket.post(*ticket.state.take_events(), Finished(result=ticket.state.result()))
            self._end(ticket, error)

    def _fetches(self, ticket: _Ticket) -> list[Fetch]:
        queries = tuple(ticket.state.take_queries())
        return [Fetch(ticket.engine, ticket, queries)] if queries else []

    def _batch_of(self, engine: GenerationEngine) -> DecodingBatch:
        if engine not in self._batches:
            self._batches[engine] = DecodingBatch(engine.model, max_batch_size=self._max_batch_size)
        return self._batches[engine]

    def _memory_for(self, batch: DecodingBatch) -> int:
        """What the other batches leave of `max_cached_tokens`."""
        return self._max_cached_tokens - sum(
            other.num_cached_tokens for other in self._batches.values() if other is not batch
        )


def _goes_with(group: Sequence[_Ticket], ticket: _Ticket) -> bool:
    """Whether a prompt can be read in one pass with `group` without much padding and in bounded time."""
    first, length = group[0].state.num_prompt_tokens, ticket.state.num_prompt_tokens
    longest = max(length, *(other.state.num_prompt_tokens for other in group))
    return (
        ticket.engine is group[0].engine
        and abs(length - first) <= ticket.engine.model.config.chunk_length
        and longest * (len(group) + 1) <= MAX_PREFILL_TOKENS
    )
