"""Figures of a scheduler, for metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retro_ray.generation.neighbours import RetrievedChunk


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """What a scheduler does now and has done since its start. Times are seconds of wall clock."""

    queued: int
    active: int
    cached_tokens: int
    """That there is memory for at the moment."""
    max_cached_tokens: int
    requests_finished: int
    requests_failed: int
    """Given up with an error, or by the client."""
    prompt_tokens: int
    tokens_generated: int
    prefill_s: float
    decode_s: float
    num_steps: int
    batch_size_sum: int
    """Of the sequences that took part in each step: over `num_steps`, the mean batch size."""
    retrieval_s: float
    retrieval_hidden_share: float
    """Share of `retrieval_s` in which the decoding thread had other work; 0 before any retrieval."""
    missing_shards: tuple[int, ...]
    """Shards that have ever not answered."""
    partial_answers: int
    """Chunks whose neighbours were retrieved without some shard."""


@dataclass
class Counters:
    """What of it is counted; written by the decoding thread alone."""

    requests_finished: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    tokens_generated: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
    batch_size_sum: int = 0
    stalled_s: float = 0.0
    """In which there were requests, and each of them waited for neighbours."""
    missing_shards: frozenset[int] = frozenset()
    partial_answers: int = 0

    def take_in(self, retrieved: Sequence[RetrievedChunk]) -> None:
        """Count answers of retrieval."""
        for answer in retrieved:
            self.missing_shards |= frozenset(answer.neighbours.missing_shards)
            self.partial_answers += bool(answer.neighbours.missing_shards)

    def stats(
        self, *, queued: int, active: int, cached_tokens: int, max_cached_tokens: int, retrieval_s: float
    ) -> SchedulerStats:
        """These figures, and those of the moment."""
        counted: dict[str, Any] = dataclasses.asdict(self)
        counted["missing_shards"] = tuple(sorted(self.missing_shards))
        stalled_s = counted.pop("stalled_s")
        return SchedulerStats(
            **counted,
            queued=queued,
            active=active,
            cached_tokens=cached_tokens,
            max_cached_tokens=max_cached_tokens,
            retrieval_s=retrieval_s,
            retrieval_hidden_share=max(0.0, 1 - stalled_s / retrieval_s) if retrieval_s else 0.0,
        )
