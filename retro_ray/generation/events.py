"""What a request answers while it is being generated.

The texts, token ids and log-probabilities of all deltas, one after another, are those of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from retro_ray.generation.request import Citation, GenerationResult, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """More text: whole characters, none of which may turn out to belong to a stop string."""

    text: str
    token_ids: tuple[int, ...]
    """The generated tokens that this text, or what precedes it, completes."""
    logprobs: tuple[TokenLogprob, ...] | None
    """Of these tokens, and of the prompt's in an echo; None if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """The neighbours that the text from here on is conditioned on; where that ends is not known yet."""

    citation: Citation


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event."""

    result: GenerationResult


GenerationEvent = TextDelta | Retrieved | Finished
