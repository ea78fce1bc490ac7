"""What is asked of generation, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retro_ray.errors import PromptError
from retro_ray.generation.sampling import SamplingConfig

MAX_NEIGHBOURS = 64
"""Per chunk; the paper gains nothing beyond 40."""

MAX_LOGPROBS = 5
"""Alternatives per token, as in OpenAI's completions."""

FinishReason = Literal["stop", "length", "cancelled"]
Rerank = Literal["none", "overlap"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt to continue, and how."""

    prompt: str = ""
    """Empty: the start of a new document."""
    prompt_tokens: tuple[int, ...] | None = None
    """The prompt as token ids, in place of text; the start-of-document token is put in front of them
    unless they begin with it."""
    max_tokens: int = 64
    """Generated at most; 0, together with `echo`, scores the prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    """Generation ends at the first of these, which is left out of the text."""
    logprobs: int | None = None
    """Report every token's log-probability, and of so many alternatives; None: of none."""
    echo: bool = False
    """The answer's text and log-probabilities begin with the prompt's."""
    retrieval: bool = True
    """False: nothing is retrieved (RETRO[OFF])."""
    num_neighbours: int | None = None
    """Neighbours per chunk; None: as many as the model was trained with."""
    rerank: Rerank | None = None
    """How neighbours are put in order once they are found; None: as the retriever does by itself."""
    deadline_s: float | None = None
    """Given up so long after it came in; None: never."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompt_tokens is not None:
            raise PromptError("both prompt and prompt_tokens are given; leave one of them out")
        if self.max_tokens < (0 if self.echo else 1):
            raise PromptError(f"max_tokens is {self.max_tokens}; it must be at least 1, or 0 together with echo")
        if "" in self.stop:
            raise PromptError("stop has an empty string, which would end every text at once; leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise PromptError(f"logprobs is {self.logprobs}; it must be from 0 to {MAX_LOGPROBS}, or left out")
        if self.num_neighbours is not None and not 1 <= self.num_neighbours <= MAX_NEIGHBOURS:
            raise PromptError(
                f"num_neighbours is {self.num_neighbours}; it must be from 1 to {MAX_NEIGHBOURS}, "
                "or turn retrieval off for this request"
            )
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise PromptError(f"deadline_s is {self.deadline_s}; it must be above 0, or left out")


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
    last_token: int | None
    """Position of the last one; None while the stretch is being generated."""
    text_start: int
    """The same stretch in characters: text[text_start:text_end]."""
    text_end: int | None
    neighbours: tuple[CitedNeighbour, ...]
    """Nearest first."""
    missing_shards: tuple[int, ...]
    """Shards that did not answer: their chunks may have been nearer."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How likely the model found a token; natural logarithms of its own distribution, before
    temperature, penalty and filters.
    """

    token_id: int
    text: str
    """The answer's text from `text_offset` on that this token completes; a character whose bytes are
    split between tokens belongs to the last of them."""
    text_offset: int
    logprob: float | None
    """None for a document's first token, which nothing predicts."""
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens' texts, each decoded alone, with their log-probabilities; the likeliest
    first. Tokens that are parts of characters may look alike."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished request."""

    text: str
    """What was generated, after the prompt if that is echoed, without the stop string and without
    special tokens."""
    token_ids: tuple[int, ...]
    """Every generated token, those of the stop string and the end-of-text token included."""
    finish_reason: FinishReason
    """`stop`: an end-of-text token or a stop string; `length`: max_tokens; `cancelled`: the service
    shut down in the middle."""
    citations: tuple[Citation, ...]
    num_prompt_tokens: int
    """The start-of-document token included."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the tokens that were generated, after those of the prompt if that is echoed (without the
    start-of-document token, unless the request gave it); None if not asked for."""
