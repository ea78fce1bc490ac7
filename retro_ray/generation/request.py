"""What is asked of generation, what it answers, and the state of one request in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retro_ray.errors import PromptError
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.text.tokenizer import TextTokenizer

MAX_NEIGHBOURS = 64
"""Per chunk; the paper gains nothing beyond 40."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt to continue, and how."""

    prompt: str = ""
    """Empty: the start of a new document."""
    max_tokens: int = 64
    """Generated at most."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    """Generation ends at the first of these, which is left out of the text."""
    retrieval: bool = True
    """False: nothing is retrieved (RETRO[OFF])."""
    num_neighbours: int | None = None
    """Neighbours per chunk; None: as many as the model was trained with."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise PromptError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if "" in self.stop:
            raise PromptError("stop has an empty string, which would end every text at once; leave it out")
        if self.num_neighbours is not None and not 1 <= self.num_neighbours <= MAX_NEIGHBOURS:
            raise PromptError(
                f"num_neighbours is {self.num_neighbours}; it must be from 1 to {MAX_NEIGHBOURS}, "
                "or turn retrieval off for this request"
            )


@dataclass(frozen=True, kw_only=True)
class CitedNeighbour:
    """A chunk of the database that a text was conditioned on."""

    chunk_id: int
    document_id: str
    title: str
    source: str
    distance: float
    """Squared L2 between the embeddings of this chunk and of the query."""
    text: str
    """The chunk that was found (N)."""
    continuation: str
    """What follows it in its document (F); empty at the document's end."""


@dataclass(frozen=True, kw_only=True)
class Citation:
    """The neighbours that one stretch of generated text was conditioned on."""

    chunk: int
    """The chunk, counted from 1, whose neighbours these are."""
    query: str
    """Its text, which was searched for."""
    first_token: int
    """Position of the first generated token that they conditioned; 0 is the prompt's first token."""
    last_token: int
    """Position of the last one."""
    text_start: int
    """The same stretch in characters: text[text_start:text_end]."""
    text_end: int
    neighbours: tuple[CitedNeighbour, ...]
    """Nearest first."""
    missing_shards: tuple[int, ...]
    """Shards that did not answer: their chunks may have been nearer."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished request."""

    text: str
    """What was generated, without the stop string and without special tokens."""
    token_ids: tuple[int, ...]
    """Every generated token, those of the stop string and the end-of-text token included."""
    finish_reason: FinishReason
    """`stop`: an end-of-text token or a stop string; `length`: max_tokens."""
    citations: tuple[Citation, ...]
    num_prompt_tokens: int


@dataclass(frozen=True)
class RetrievedChunk:
    """A chunk of one sequence, with its row in the answer that was retrieved for it."""

    chunk: int
    """Counted from 1."""
    neighbours: NeighbourSet
    row: int


class SequenceState:
    """One request on its way: its tokens so far and what has been retrieved for them."""

    def __init__(
        self, request: GenerationRequest, prompt_tokens: list[int], tokenizer: TextTokenizer, num_neighbours: int
    ) -> None:
        self.request = request
        self.tokens = list(prompt_tokens)
        self.num_prompt_tokens = len(prompt_tokens)
        self.num_neighbours = num_neighbours
        """Asked for per chunk; 0: nothing is retrieved."""
        self.generator = request.sampling.new_generator()
        self.retrieved: list[RetrievedChunk] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._num_context_characters = len(tokenizer.decode(self.tokens[-1:]))

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    def append(self, token: int) -> None:
        """Take in the next token, and finish if it is the last one."""
        self.tokens.append(token)
        num_generated = len(self.tokens) - self.num_prompt_tokens
        if token == self._tokenizer.eos_id or (self.request.stop and self._stop_position(self._decoded()) is not None):
            self.finish_reason = "stop"
        elif num_generated == self.request.max_tokens:
            self.finish_reason = "length"

    def text(self) -> str:
        """What has been generated so far, up to the first stop string."""
        decoded = self._decoded()
        return decoded[: self._stop_position(decoded)]

    def result(self, chunk_length: int) -> GenerationResult:
        """The answer to a finished request."""
        assert self.finish_reason is not None, "the sequence has not finished"
        return GenerationResult(
            text=self.text(),
            token_ids=tuple(self.generated),
            finish_reason=self.finish_reason,
            citations=self.citations(chunk_length),
            num_prompt_tokens=self.num_prompt_tokens,
        )

    def citations(self, chunk_length: int) -> tuple[Citation, ...]:
        """The retrieved chunks that conditioned a generated token: chunk u those at u*m .. (u+1)*m - 1.

        (The logits at position t choose the token at t + 1, so that is u*m - 1 <= t < (u+1)*m - 1.)
        """
        num_characters = len(self.text())
        cited = []
        for retrieved in self.retrieved:
            start = max(retrieved.chunk * chunk_length, self.num_prompt_tokens)
            end = min((retrieved.chunk + 1) * chunk_length, len(self.tokens))
            if start >= end:
                continue
            first_token = (retrieved.chunk - 1) * chunk_length
            cited.append(
                Citation(
                    chunk=retrieved.chunk,
                    query=self._tokenizer.decode(self.tokens[first_token : first_token + chunk_length]),
                    first_token=start,
                    last_token=end - 1,
                    text_start=min(self._num_characters_before(start), num_characters),
                    text_end=min(self._num_characters_before(end), num_characters),
                    neighbours=self._cited_neighbours(retrieved, chunk_length),
                    missing_shards=retrieved.neighbours.missing_shards,
                )
            )
        return tuple(cited)

    def _cited_neighbours(self, retrieved: RetrievedChunk, chunk_length: int) -> tuple[CitedNeighbour, ...]:
        found, row = retrieved.neighbours, retrieved.row
        cited = []
        for k, document in enumerate(found.documents[row]):
            if document is None:
                continue
            tokens, mask = found.tokens[row, k], found.mask[row, k]
            here, after = slice(None, chunk_length), slice(chunk_length, None)
            text, continuation = self._tokenizer.decode_batch(
                [tokens[part][mask[part]].tolist() for part in (here, after)]
            )
            cited.append(
                CitedNeighbour(
                    chunk_id=int(found.chunk_ids[row, k]),
                    document_id=document.id,
                    title=document.title,
                    source=document.source,
                    distance=float(found.distances[row, k]),
                    text=text,
                    continuation=continuation,
                )
            )
        return tuple(cited)

    def _decoded(self, end: int | None = None) -> str:
        """The generated text, up to the token at position `end`.

        Decoded after the prompt's last token: some tokenizers drop the space before a first word.
        """
        decoded = self._tokenizer.decode(self.tokens[self.num_prompt_tokens - 1 : end])
        return decoded[self._num_context_characters :]

    def _stop_position(self, decoded: str) -> int | None:
        found = [decoded.find(stop) for stop in self.request.stop]
        return min((position for position in found if position >= 0), default=None)

    def _num_characters_before(self, position: int) -> int:
        if position == len(self.tokens):
            return len(self._decoded())
        # A character whose bytes are split between two tokens belongs to the later one.
        return len(self._decoded(position).rstrip("\ufffd"))
