"""What POST /v1/completions answers, whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from typing import Literal

from pydantic import BaseModel

from retro_ray.generation.events import Finished, GenerationEvent, Retrieved, TextDelta
from retro_ray.generation.request import Citation, FinishReason, GenerationResult, TokenLogprob


class Logprobs(BaseModel):
    """OpenAI's form of log probabilities; the four lists are aligned."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt: nothing precedes it."""
    top_logprobs: list[dict[str, float] | None] | None
    """The likeliest tokens of each place; None if none were asked for."""
    text_offset: list[int]
    """Where each token starts in the choice's text."""

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob], num_top: int) -> Logprobs:
        return cls(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_by_text(token) for token in tokens] if num_top else None,
            text_offset=[token.text_offset for token in tokens],
        )


class Choice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason
    citations: tuple[Citation, ...]
    """Ours: what the completion was conditioned on, chunk by chunk."""


class Usage(BaseModel):
    """Tokens read (each prompt once, its start-of-document token included) and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, results: Sequence[GenerationResult], n: int) -> Usage:
        """Of all choices, n of each prompt."""
        prompt_tokens = sum(result.num_prompt_tokens for result in results[::n])
        completion_tokens = sum(len(result.token_ids) for result in results)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class CompletionReply(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(BaseModel):
    """What one event adds to one completion."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    citations: tuple[Citation, ...] = ()
    """Ours. Neighbours that have just been retrieved, whose stretch of text is not at its end yet (`text_end` and
    `last_token` are null); with `finish_reason` all citations of the completion."""


class CompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    """Only where `stream_options.include_usage` asks for it: in the last event, which has no choices."""


class ReplyWriter:
    """Writes the answer to one request: `n` completions of each prompt.

    Args:
        model: the served model's name.
        n: completions per prompt.
        num_top: likeliest tokens of each place; None: no log probabilities are wanted.
    """

    def __init__(self, model: str, n: int, num_top: int | None) -> None:
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._n = n
        self._num_top = num_top

    def reply(self, results: Sequence[GenerationResult]) -> CompletionReply:
        choices = [
            Choice(
                index=i,
                text=result.text,
                logprobs=self._logprobs(result.logprobs),
                finish_reason=result.finish_reason,
                citations=result.citations,
            )
            for i, result in enumerate(results)
        ]
        return CompletionReply(**self._head, choices=choices, usage=Usage.of(results, self._n))

    async def chunks(
        self, events: AsyncGenerator[tuple[int, GenerationEvent], None], *, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        """One JSON text per event of the stream.

        Args:
            events: of all choices, with the choice's index.
            include_usage: end with the token counts.
        """
        results: dict[int, GenerationResult] = {}
        left_out = None if include_usage else {"usage"}
        async with aclosing(events):
            async for index, event in events:
                if isinstance(event, Finished):
                    results[index] = event.result
                choice = self._chunk_choice(index, event)
                if choice is not None:
                    yield CompletionChunk(**self._head, choices=[choice]).model_dump_json(exclude=left_out)
        if include_usage:
            usage = Usage.of([results[index] for index in sorted(results)], self._n)
            yield CompletionChunk(**self._head, choices=[], usage=usage).model_dump_json()

    def _chunk_choice(self, index: int, event: GenerationEvent) -> ChunkChoice | None:
        """None for an event that adds nothing a client sees."""
        if isinstance(event, Retrieved):
            return ChunkChoice(index=index, text="", citations=(event.citation,))
        if isinstance(event, Finished):
            result = event.result
            return ChunkChoice(index=index, text="", finish_reason=result.finish_reason, citations=result.citations)
        assert isinstance(event, TextDelta)
        if not event.text and not event.logprobs:
            return None
        return ChunkChoice(index=index, text=event.text, logprobs=self._logprobs(event.logprobs))

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> Logprobs | None:
        return None if self._num_top is None or tokens is None else Logprobs.of(tokens, self._num_top)


def _by_text(token: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens, and the one that was chosen; of those that look alike, the likeliest."""
    if token.logprob is None:
        return None
    by_text = dict(reversed(token.top))  # the likeliest last, so that it is the one that stays
    if token.text:
        by_text.setdefault(token.text, token.logprob)
    return by_text


async def collect_results(
    events: AsyncIterable[tuple[int, GenerationEvent]], num_choices: int
) -> list[GenerationResult]:
    """The results of all choices, in their order."""
    results: dict[int, GenerationResult] = {}
    async for index, event in events:
        if isinstance(event, Finished):
            results[index] = event.result
    return [results[index] for index in range(num_choices)]
