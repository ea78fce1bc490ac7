"""Continuous batching: requests join and leave the batch between two steps. Plain threads; knows no Ray.

One thread decodes (decoding_loop.py), another one retrieves neighbours (fetcher.py); requests come
from, and events go to, any asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from retro_ray.errors import PromptError
from retro_ray.generation.batch import slot_size
from retro_ray.generation.decoding_loop import DecodingLoop
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import Finished, GenerationEvent
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sequence import SequenceState
from retro_ray.generation.stats import SchedulerStats
from retro_ray.generation.ticket import Ticket


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
        config = engine.model.config
        whole_context = slot_size(config, config.context_length, config.num_neighbours)
        self._max_cached_tokens = max_cached_tokens or max_batch_size * whole_context
        self._decoding = DecodingLoop(engine, max_batch_size, self._max_cached_tokens, max_queued)

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
        engine, state = self._start(request)
        ticket = Ticket(engine, state, asyncio.get_running_loop())
        self._decoding.submit(ticket)
        try:
            while True:
                item = await ticket.events.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            self._decoding.give_up(ticket)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """The answer to `request`; raises as `stream` does."""
        async with contextlib.aclosing(self.stream(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise AssertionError("a stream ends with Finished or an error")

    def stats(self) -> SchedulerStats:
        return self._decoding.stats()

    def replace_engine(self, engine: GenerationEngine) -> None:
        """Serve requests that come from now on with `engine`; those that are here finish on theirs."""
        self._decoding.engine = engine
        self._decoding.wake()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, and return when all are finished, or `drain_s` have passed.

        What is then being decoded ends as it is, with finish_reason `cancelled`; what is still queued
        ends with an OverloadedError.
        """
        self._decoding.close(drain_s)

    def _start(self, request: GenerationRequest) -> tuple[GenerationEngine, SequenceState]:
        engine = self._decoding.engine
        state = engine.start(request)
        size = slot_size(engine.model.config, state.max_length, state.num_neighbours)
        if size > self._max_cached_tokens:
            raise PromptError(
                f"{state.max_length} tokens with {state.num_neighbours} neighbours per chunk take the memory of "
                f"{size} tokens, max_cached_tokens is {self._max_cached_tokens}: shorten the prompt, lower max_tokens "
                "or num_neighbours"
            )
        return engine, state
