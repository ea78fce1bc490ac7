"""What the service measures of itself. Where the figures go is the caller's: Ray's metrics, or a test's."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from retro_ray.generation.events import Finished, GenerationEvent, TextDelta
from retro_ray.generation.request import Rerank
from retro_ray.retrieval.retriever import NeighbourSet

_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
"""Boundaries of histograms."""


class Count(Protocol):
    """As ray.util.metrics.Counter."""

    def inc(self, value: int | float = 1.0, tags: Any = None) -> None: ...


class Level(Protocol):
    """As ray.util.metrics.Gauge."""

    def set(self, value: int | float, tags: Any = None) -> None: ...


class Distribution(Protocol):
    """As ray.util.metrics.Histogram."""

    def observe(self, value: int | float, tags: Any = None) -> None: ...


class Instruments(Protocol):
    """Makes instruments by name; the modules ray.util.metrics and ray.serve.metrics do it."""

    def Counter(self, name: str, description: str, tag_keys: tuple[str] | None = None) -> Count: ...

    def Gauge(self, name: str, description: str) -> Level: ...

    def Histogram(self, name: str, description: str, boundaries: list[float]) -> Distribution: ...


class ServiceMetrics:
    """The instruments of one replica. Tokens per second are the rate of the counters of tokens."""

    def __init__(self, instruments: Instruments) -> None:
        def counter(name: str, description: str, tag_keys: tuple[str] | None = None) -> Count:
            return instruments.Counter(f"retro_ray_{name}", description, tag_keys)

        def gauge(name: str, description: str) -> Level:
            return instruments.Gauge(f"retro_ray_{name}", description)

        def seconds(name: str, description: str) -> Distribution:
            return instruments.Histogram(f"retro_ray_{name}_seconds", description, _SECONDS)

        self.completions = counter("completions", "Completions, by how they ended", ("outcome",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read")
        self.generated_tokens = counter("generated_tokens", "Tokens that were generated")
        self.time_to_first_token = seconds("time_to_first_token", "From a request to its first generated token")
        self.time_per_token = seconds("time_per_token", "Between generated tokens of a completion, on average")
        self.retrieval = seconds("retrieval", "One retrieval for the chunks of a batch, embedding included")
        self.retrieved_chunks = counter("retrieved_chunks", "Chunks whose neighbours were retrieved")
        self.partial_retrievals = counter("partial_retrievals", "Retrievals that a shard was missing from")
        self.missing_shards = gauge("missing_shards", "Shards that did not answer the last retrieval")
        self.batch_size = gauge("batch_size", "Completions that are being decoded together")
        self.queued = gauge("queued_completions", "Completions that wait for a place in the batch")
        self.cached_tokens = gauge("cached_tokens", "Tokens that hold a place in the cache")
        self.cache_size = gauge("cache_size_tokens", "Tokens that the cache may hold")

    async def measured(self, events: AsyncGenerator[GenerationEvent, None]) -> AsyncGenerator[GenerationEvent, None]:
        """`events`, and what is to be learnt from them."""
        started_s = time.monotonic()
        first_s: float | None = None
        outcome = "disconnected"  # who asked closes this before its end
        try:
            async with aclosing(events):
                async for event in events:
                    if first_s is None and isinstance(event, TextDelta) and event.token_ids:
                        first_s = time.monotonic()
                        self.time_to_first_token.observe(first_s - started_s)
                    if isinstance(event, Finished):
                        outcome = event.result.finish_reason
                        self._count_tokens(event, first_s)
                    yield event
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self.completions.inc(tags={"outcome": outcome})

    def _count_tokens(self, event: Finished, first_s: float | None) -> None:
        num_generated = len(event.result.token_ids)
        self.prompt_tokens.inc(event.result.num_prompt_tokens)
        if num_generated:  # instruments of Ray refuse to count nothing
            self.generated_tokens.inc(num_generated)
        if first_s is not None and num_generated > 1:
            self.time_per_token.observe((time.monotonic() - first_s) / (num_generated - 1))


class Search(Protocol):
    """As ChunkRetriever."""

    def retrieve_texts(self, texts: Sequence[str], k: int, /, rerank: Rerank | None = None) -> NeighbourSet: ...

    def retrieve_chunks(
        self, chunks: Sequence[Sequence[int]], k: int, /, rerank: Rerank | None = None
    ) -> NeighbourSet: ...


class MeasuredSearch:
    """A retriever whose answers are measured."""

    def __init__(self, search: Search, metrics: ServiceMetrics) -> None:
        self._metrics = metrics
        self.retrieve_texts = self._measured(search.retrieve_texts)
        self.retrieve_chunks = self._measured(search.retrieve_chunks)

    def _measured(self, retrieve: Callable[..., NeighbourSet]) -> Callable[..., NeighbourSet]:
        def measured(queries: Sequence[Any], k: int, /, rerank: Rerank | None = None) -> NeighbourSet:
            started_s = time.monotonic()
            found = retrieve(queries, k, rerank=rerank)
            self._metrics.retrieval.observe(time.monotonic() - started_s)
            if queries:  # instruments of Ray refuse to count nothing
                self._metrics.retrieved_chunks.inc(len(queries))
            self._metrics.missing_shards.set(len(found.missing_shards))
            if found.missing_shards:
                self._metrics.partial_retrievals.inc()
            return found

        return measured
