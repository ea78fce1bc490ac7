"""What the HTTP face stands in front of: one model with its database. Knows neither HTTP nor Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from retro_ray.generation.events import GenerationEvent
from retro_ray.generation.request import CitedNeighbour, GenerationRequest, Rerank


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What is being served right now; a new checkpoint or an edit of the database changes it."""

    name: str
    created: int
    """When its checkpoint was taken up, seconds since 1970."""
    checkpoint_step: int
    context_length: int
    """Tokens of prompt and completion together."""
    chunk_length: int
    """Tokens of a chunk (m)."""
    num_neighbours: int
    """Per chunk, where a request does not say."""
    database_version: str


@dataclass(frozen=True, kw_only=True)
class RetrievedText:
    """What was found for one text."""

    neighbours: tuple[CitedNeighbour, ...]
    """Nearest first."""
    missing_shards: tuple[int, ...]
    """Shards that did not answer: their chunks may have been nearer."""


class GenerationService(Protocol):
    """Generates and retrieves.

    All of it raises PromptError for what can never be served, OverloadedError for what cannot be served
    now, RetrievalError where the database does not answer.
    """

    def model(self) -> ServedModel: ...

    def problems(self) -> Sequence[str]:
        """Why requests cannot be answered now, one line each; empty: they can."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """Raises PromptError if `request` can never be served."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """The events of one completion, the last of them Finished. Closing it ends the work for it.

        Raises:
            DeadlineError: the request's deadline passed.
        """
        ...

    async def retrieve(
        self, texts: Sequence[str], num_neighbours: int | None, rerank: Rerank | None
    ) -> list[RetrievedText]:
        """The nearest chunks of each text; None: as many, and put in such an order, as generation does."""
        ...

    async def start(self) -> None:
        """Begin whatever goes on beside the requests."""
        ...

    async def close(self) -> None:
        """Let what runs come to its end, and take nothing new."""
        ...
