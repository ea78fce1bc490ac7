"""Figures of a scheduler, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    stalled_s: float = 0.0
    """In which requests were there, and each of them waited for neighbours."""
    num_steps: int = 0
    batch_size_sum: int = 0
    missing_shards: set[int] = field(default_factory=set)
    partial_answers: int = 0
