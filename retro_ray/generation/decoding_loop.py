"""The thread that decodes: in every turn it takes in what has come, reads new prompts, and makes a step."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from retro_ray.errors import OverloadedError
from retro_ray.generation.batch import DecodingBatch
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import Finished
from retro_ray.generation.fetcher import Fetch, NeighbourFetcher, Outcome
from retro_ray.generation.sequence import SequenceState
from retro_ray.generation.stats import Counters, SchedulerStats
from retro_ray.generation.ticket import Ticket

MAX_PREFILL_TOKENS = 2048
"""Of the prompts, padded, that are read in one pass if they are several: between two passes, the
sequences that are being decoded make a step."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Lane:
    """What serves the requests of one engine."""

    batch: DecodingBatch
    fetcher: NeighbourFetcher


class DecodingLoop:
    """Decodes requests together as they come; the thread behind a GenerationScheduler, which see.

    A request is first queued, while the neighbours of its prompt's chunks are fetched, then active in
    a batch until it is finished.
    """

    def __init__(self, engine: GenerationEngine, max_batch_size: int, max_cached_tokens: int, max_queued: int) -> None:
        self.engine = engine
        """For new requests; what others keep in memory is given back when their requests are finished."""
        self._max_batch_size = max_batch_size
        self._max_cached_tokens = max_cached_tokens
        self._max_queued = max_queued
        # The condition guards what several threads write.
        self._condition = threading.Condition()
        self._queue: list[Ticket] = []
        self._outcomes: list[Outcome] = []
        self._retrieval_s = 0.0
        self._has_news = False
        self._is_closing = False
        self._is_closed = False
        # What follows is written by the decoding thread alone.
        self._active: dict[SequenceState, Ticket] = {}
        self._lanes: dict[GenerationEngine, _Lane] = {}
        self._counters = Counters()
        self._mean_request_s = 1.0
        self._thread = threading.Thread(target=self._run, name="retro-ray-decoding", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request.

        Raises:
            OverloadedError: too many wait already, or the loop is closing.
        """
        with self._condition:
            if self._is_closing:
                raise OverloadedError("this service is shutting down: ask again in a moment")
            if len(self._queue) >= self._max_queued:
                num_rounds = (len(self._queue) + 1) / self._max_batch_size
                raise OverloadedError(
                    f"{len(self._queue)} requests wait already, max_queued is {self._max_queued}: ask again later",
                    retry_after_s=max(1.0, num_rounds * self._mean_request_s),
                )
            self._queue.append(ticket)
        self.wake()

    def give_up(self, ticket: Ticket) -> None:
        """Nobody waits for `ticket` any longer: its slot is free before the next step."""
        ticket.is_given_up = True
        self.wake()

    def wake(self) -> None:
        with self._condition:
            self._has_news = True
            self._condition.notify_all()

    def close(self, drain_s: float) -> None:
        """Take no more requests, and return when all are finished, or were ended after `drain_s`."""
        with self._condition:
            self._is_closing = True
            self._condition.wait_for(lambda: not self._queue and not self._active, timeout=drain_s)
            self._is_closed = True
        self.wake()
        self._thread.join()

    def stats(self) -> SchedulerStats:
        return self._counters.stats(
            queued=len(self._queue),
            active=len(self._active),
            cached_tokens=sum(lane.batch.num_cached_tokens for lane in list(self._lanes.values())),
            max_cached_tokens=self._max_cached_tokens,
            retrieval_s=self._retrieval_s,
        )

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
        self._take_in_neighbours()
        self._drop_given_up()
        self._ask_for_prompts()
        self._drop_lanes()
        has_admitted = self._admit()
        return self._step() or has_admitted

    def _on_retrieved(self, outcomes: list[Outcome], seconds: float) -> None:
        with self._condition:
            self._outcomes += outcomes
            self._retrieval_s += seconds
        self.wake()

    def _take_in_neighbours(self) -> None:
        """What was retrieved goes to those who wait for it, and what failed, too."""
        with self._condition:
            outcomes, self._outcomes = self._outcomes, []
        for fetch, outcome in outcomes:
            ticket = fetch.owner
            assert isinstance(ticket, Ticket)
            if ticket.is_over:
                continue
            if isinstance(outcome, Exception):
                logger.warning("retrieval failed: %s", outcome)
                self._end(ticket, outcome)
                continue
            ticket.state.retrieved += outcome
            self._counters.take_in(outcome)

    def _drop_given_up(self) -> None:
        now = time.monotonic()
        for ticket in [*self._queue, *self._active.values()]:
            if ticket.is_given_up:
                self._end(ticket)
            elif now >= ticket.deadline:
                self._end(ticket, ticket.deadline_error())

    def _ask_for_prompts(self) -> None:
        """Neighbours for the prompts that are next in the queue."""
        for ticket in self._queue[: 2 * self._max_batch_size]:
            if not ticket.was_asked_for:
                ticket.was_asked_for = True
                self._lane(ticket.engine).fetcher.ask(_fetches([ticket]), urgent=False)

    def _admit(self) -> bool:
        """Read the next prompts, if there are any that fit."""
        group = self._next_prompts()
        if not group:
            return False
        batch = self._lane(group[0].engine).batch
        states = [ticket.state for ticket in group]
        with self._condition:
            self._active |= zip(states, group, strict=True)
            self._queue = [ticket for ticket in self._queue if ticket not in group]
        start = time.monotonic()
        batch.admit(states, self._memory_for(batch))
        self._counters.prefill_s += time.monotonic() - start
        self._counters.prompt_tokens += sum(state.num_prompt_tokens for state in states)
        self._counters.tokens_generated += sum(len(state.generated) for state in states)
        self._tell(group)
        return True

    def _next_prompts(self) -> list[Ticket]:
        """Those that are read in one pass: the first that is ready, and others of about its length."""
        group: list[Ticket] = []
        for ticket in list(self._queue):
            if not ticket.is_ready or (group and not _goes_with(group, ticket)):
                continue
            states = [other.state for other in (*group, ticket)]
            if not self._fits(self._lane(ticket.engine).batch, states):
                break  # nobody overtakes the first that does not fit, or it might wait for ever
            group.append(ticket)
        return group

    def _fits(self, batch: DecodingBatch, states: Sequence[SequenceState]) -> bool:
        if len(self._active) + len(states) > self._max_batch_size:
            return False
        if not batch.fits(states, self._memory_for(batch)):
            # Engines that have been replaced need no room for more.
            for engine, lane in self._lanes.items():
                if engine is not self.engine:
                    lane.batch.release()
        return batch.fits(states, self._memory_for(batch))

    def _step(self) -> bool:
        """One step of every batch."""
        has_stepped = False
        for lane in list(self._lanes.values()):
            start, num_before = time.monotonic(), {state: len(state.tokens) for state in lane.batch.active}
            produced = lane.batch.step()
            if produced:
                self._counters.decode_s += time.monotonic() - start
                self._counters.num_steps += 1
                self._counters.batch_size_sum += len(produced)
                self._counters.tokens_generated += sum(len(state.tokens) - num_before[state] for state in produced)
                self._tell([self._active[state] for state in produced])
                has_stepped = True
        return has_stepped

    def _tell(self, tickets: Sequence[Ticket]) -> None:
        """Send what is new of requests of one engine, end the finished ones, ask for the others' neighbours."""
        for ticket in tickets:
            events = ticket.state.take_events()
            if ticket.state.finish_reason is None:
                ticket.post(*events)
            else:
                self._end(ticket)
                ticket.post(*events, Finished(result=ticket.state.result()))
        self._lane(tickets[0].engine).fetcher.ask(_fetches(tickets), urgent=True)

    def _end(self, ticket: Ticket, error: Exception | None = None) -> None:
        """Nothing more is done for `ticket`, which is finished, or given up, or ends with an error."""
        ticket.is_over = True
        if ticket.state.finish_reason is None:
            self._counters.requests_failed += 1
            lane = self._lanes.get(ticket.engine)
            if lane is not None and ticket.state in lane.batch.active:
                lane.batch.remove(ticket.state)
        else:
            self._counters.requests_finished += 1
            self._mean_request_s += 0.1 * (time.monotonic() - ticket.submitted - self._mean_request_s)
        with self._condition:
            self._active.pop(ticket.state, None)
            self._queue = [other for other in self._queue if other is not ticket]
            self._condition.notify_all()
        if error is not None:
            ticket.post(error)

    def _end_all(self, cause: Exception | None) -> None:
        """With an error; or, where there is none, because the loop closes."""
        for lane in self._lanes.values():
            lane.fetcher.close()
        self._lanes.clear()
        for ticket in [*self._active.values(), *self._queue]:
            if cause is not None:
                error = RuntimeError(f"decoding failed ({type(cause).__name__}); the log has the cause")
                error.__cause__ = cause
                self._end(ticket, error)
            elif ticket.state in self._active:
                ticket.state.finish("cancelled")
                self._end(ticket)
                ticket.post(*ticket.state.take_events(), Finished(result=ticket.state.result()))
            else:
                message = "this service shut down before the request's turn came: ask again in a moment"
                self._end(ticket, OverloadedError(message))

    def _lane(self, engine: GenerationEngine) -> _Lane:
        if engine not in self._lanes:
            batch = DecodingBatch(engine.model, max_batch_size=self._max_batch_size)
            self._lanes[engine] = _Lane(batch, NeighbourFetcher(engine, self._on_retrieved))
        return self._lanes[engine]

    def _drop_lanes(self) -> None:
        """Those of engines that have been replaced, once their last request is over."""
        if self._lanes.keys() <= {self.engine}:
            return
        in_use = {ticket.engine for ticket in [*self._queue, *self._active.values()]} | {self.engine}
        for engine in self._lanes.keys() - in_use:
            self._lanes.pop(engine).fetcher.close()

    def _memory_for(self, batch: DecodingBatch) -> int:
        """What the other batches leave of `max_cached_tokens`."""
        others = (lane.batch for lane in self._lanes.values() if lane.batch is not batch)
        return self._max_cached_tokens - sum(other.num_cached_tokens for other in others)


def _fetches(tickets: Sequence[Ticket]) -> list[Fetch]:
    """What is to be asked for by now."""
    queries = ((ticket, tuple(ticket.state.take_queries())) for ticket in tickets)
    return [Fetch(ticket, wanted) for ticket, wanted in queries if wanted]


def _goes_with(group: Sequence[Ticket], ticket: Ticket) -> bool:
    """Whether a prompt can be read in one pass with `group`, without much padding and in bounded time."""
    first, length = group[0].state.num_prompt_tokens, ticket.state.num_prompt_tokens
    longest = max(length, *(other.state.num_prompt_tokens for other in group))
    return (
        ticket.engine is group[0].engine
        and abs(length - first) <= ticket.engine.model.config.chunk_length
        and longest * (len(group) + 1) <= MAX_PREFILL_TOKENS
    )
