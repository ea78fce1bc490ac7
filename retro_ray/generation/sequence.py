"""The state of one request on its way from prompt to answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from retro_ray.generation.drafts import Drafter
from retro_ray.generation.events import Retrieved, TextDelta
from retro_ray.generation.logprobs import TokenScore
from retro_ray.generation.neighbours import ChunkQuery, RetrievedChunk, cited_neighbours
from retro_ray.generation.request import (
    Citation,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    TokenLogprob,
)
from retro_ray.generation.text_stream import TextStream
from retro_ray.text.tokenizer import TextTokenizer


class SequenceState:
    """One request on its way: its tokens so far and what has been retrieved for them.

    Args:
        request: what is asked.
        prompt_tokens: its prompt, beginning with the start-of-document token.
        tokenizer: the model's.
        chunk_length: of the model.
        num_neighbours: asked for per chunk; 0: nothing is retrieved.
        query_length: tokens of a chunk after which its neighbours are asked for. Where that is fewer
            than the chunk's, chunks that the prompt does not complete are searched for by their first
            `query_length` tokens, however many more there are by then.
        drafter: guesses what follows; None: nothing is guessed.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_tokens: Sequence[int],
        tokenizer: TextTokenizer,
        *,
        chunk_length: int,
        num_neighbours: int,
        query_length: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.request = request
        self.drafter = drafter
        self.tokens = list(prompt_tokens)
        self.num_prompt_tokens = len(self.tokens)
        self.num_neighbours = num_neighbours
        self.generator = request.sampling.new_generator()
        self.retrieved: list[RetrievedChunk] = []
        self.finish_reason: FinishReason | None = None
        self.scores: list[TokenScore] = []
        """Of the tokens from `first_shown` on, if the request asks for them."""
        self._tokenizer = tokenizer
        self._chunk_length = chunk_length
        self._query_length = query_length or chunk_length
        self._num_chunks_asked = 0
        self._num_told_citations = 0
        self._num_told_tokens = 0
        self._num_told_characters = 0
        self._stop_position: int | None = None
        given = request.prompt_tokens or ()
        self.first_shown = self.num_prompt_tokens
        """Position of the first token of the answer's text."""
        if request.echo:
            self.first_shown = self.num_prompt_tokens - len(given) if given else 1
        self._stream = TextStream(tokenizer, self.tokens[: self.first_shown][-1:])
        for token in self.tokens[self.first_shown :]:
            self._stream.push(token)
        self._num_prompt_characters = len(self._stream.text)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def max_length(self) -> int:
        """Tokens that the sequence may reach."""
        return self.num_prompt_tokens + self.request.max_tokens

    # What is retrieved for it.

    def take_queries(self) -> list[ChunkQuery]:
        """The chunks whose neighbours are to be asked for by now; each is handed out once."""
        queries = []
        while self.num_neighbours and self.finish_reason is None:
            chunk = self._num_chunks_asked + 1
            start = self._num_chunks_asked * self._chunk_length
            in_prompt = chunk <= self.num_prompt_tokens // self._chunk_length
            end = start + (self._chunk_length if in_prompt else self._query_length)
            # A chunk conditions what follows it, and at the end nothing does.
            if len(self.tokens) < end or chunk * self._chunk_length >= self.max_length:
                break
            queries.append(ChunkQuery(chunk, tuple(self.tokens[start:end]), self.num_neighbours, self.request.rerank))
            self._num_chunks_asked = chunk
        return queries

    @property
    def is_waiting(self) -> bool:
        """Whether the newest token may not be read yet, because it ends a chunk whose neighbours, or
        those of a chunk before it, are not there.
        """
        if not self.num_neighbours:
            return False
        num_wanted = min(len(self.tokens), self.max_length - 1) // self._chunk_length
        return len(self.retrieved) < num_wanted

    @property
    def arrived(self) -> RetrievedChunk | None:
        """What was retrieved for the chunk that the newest token ends, if it ends one."""
        chunk, rest = divmod(len(self.tokens), self._chunk_length)
        return self.retrieved[chunk - 1] if self.num_neighbours and rest == 0 else None

    # Its tokens and its text.

    def append(self, token: int, score: TokenScore | None = None) -> None:
        """Take in the next token, and finish if it is the last one."""
        self.tokens.append(token)
        if score is not None:
            self.scores.append(score)
        num_known = len(self._stream.text)
        self._stream.push(token)
        self._stop_position = self._find_stop(num_known)
        if token == self._tokenizer.eos_id or self._stop_position is not None:
            self.finish("stop")
        elif len(self.tokens) == self.max_length:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """No more tokens come."""
        self.finish_reason = reason
        self._stream.flush()

    def text(self) -> str:
        """What there is so far, up to the first stop string."""
        return self._stream.text[: self._stop_position]

    def take_events(self) -> list[TextDelta | Retrieved]:
        """What can be told since the last time; not yet the result."""
        events: list[TextDelta | Retrieved] = [Retrieved(citation=citation) for citation in self._take_citations()]
        if self.finish_reason is None:
            end = self._num_settled_characters()
            num_tokens = bisect_right(self._stream.ends, end, hi=self._stream.num_settled)
            is_news = end > self._num_told_characters
        else:
            end, num_tokens = len(self.text()), len(self._stream.ends)
            is_news = end > self._num_told_characters or num_tokens > self._num_told_tokens
        if is_news:
            told = range(self._num_told_tokens, num_tokens)
            first_new = max(self.first_shown + told.start, self.num_prompt_tokens)
            events.append(
                TextDelta(
                    text=self._stream.text[self._num_told_characters : end],
                    token_ids=tuple(self.tokens[first_new : self.first_shown + told.stop]),
                    logprobs=self._logprobs(told),
                )
            )
            self._num_told_characters, self._num_told_tokens = end, num_tokens
        return events

    def result(self) -> GenerationResult:
        """The answer to a finished request."""
        assert self.finish_reason is not None, "the sequence has not finished"
        return GenerationResult(
            text=self.text(),
            token_ids=tuple(self.generated),
            finish_reason=self.finish_reason,
            citations=self.citations(),
            num_prompt_tokens=self.num_prompt_tokens,
            logprobs=self._logprobs(range(len(self._stream.ends))),
        )

    def citations(self) -> tuple[Citation, ...]:
        """The retrieved chunks that conditioned a generated token: chunk u those at u*m .. (u+1)*m - 1.

        (The logits at position t choose the token at t + 1, so that is u*m - 1 <= t < (u+1)*m - 1.)
        """
        return tuple(self._cite(retrieved, start, end) for retrieved, start, end in self._cited_stretches())

    def _take_citations(self) -> list[Citation]:
        """Those of stretches that have begun since the last time."""
        begun = self._cited_stretches()[self._num_told_citations :]
        self._num_told_citations += len(begun)
        return [self._cite(retrieved, start, None) for retrieved, start, _ in begun]

    def _cited_stretches(self) -> list[tuple[RetrievedChunk, int, int]]:
        """What was retrieved and conditioned generated tokens: with the first's position, and that after the last."""
        m, stretches = self._chunk_length, []
        for chunk in range(max(1, self.num_prompt_tokens // m), len(self.retrieved) + 1):
            start, end = max(chunk * m, self.num_prompt_tokens), min((chunk + 1) * m, len(self.tokens))
            if start < end:
                stretches.append((self.retrieved[chunk - 1], start, end))
        return stretches

    def _cite(self, retrieved: RetrievedChunk, start: int, end: int | None) -> Citation:
        num_characters = len(self.text())
        text_start, text_end = (
            None if position is None else min(self._stream.start_of(position - self.first_shown), num_characters)
            for position in (start, end)
        )
        return Citation(
            chunk=retrieved.query.chunk,
            query=self._tokenizer.decode(retrieved.query.tokens),
            first_token=start,
            last_token=None if end is None else end - 1,
            text_start=text_start or 0,
            text_end=text_end,
            neighbours=cited_neighbours(retrieved.neighbours, 0, self._chunk_length, self._tokenizer),
            missing_shards=retrieved.neighbours.missing_shards,
        )

    def _logprobs(self, told: range) -> tuple[TokenLogprob, ...] | None:
        """Of the tokens of the answer's text that are numbered `told`."""
        if self.request.logprobs is None:
            return None
        text = self.text()
        return tuple(
            TokenLogprob(
                token_id=self.tokens[self.first_shown + index],
                text=text[self._stream.start_of(index) : self._stream.ends[index]],
                text_offset=min(self._stream.start_of(index), len(text)),
                logprob=self.scores[index].logprob,
                top=tuple((self._tokenizer.decode([token]), value) for token, value in self.scores[index].top),
            )
            for index in told
        )

    def _find_stop(self, num_searched: int) -> int | None:
        """Where the first stop string starts, if one ends behind the first `num_searched` characters."""
        text = self._stream.text
        found = [
            text.find(stop, max(self._num_prompt_characters, num_searched - len(stop) + 1))
            for stop in self.request.stop
        ]
        return min((position for position in found if position >= 0), default=None)

    def _num_settled_characters(self) -> int:
        """The text but for the longest end of it that a stop string may begin with."""
        text, shortest = self._stream.text, len(self._stream.text)
        for stop in self.request.stop:
            longest = min(len(stop) - 1, len(text) - self._num_prompt_characters)
            held = next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
            shortest = min(shortest, len(text) - held)
        return shortest
