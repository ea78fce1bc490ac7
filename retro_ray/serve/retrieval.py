"""POST /v1/retrieve: the neighbours of texts, without generating."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from retro_ray.errors import DeadlineError
from retro_ray.generation.request import MAX_NEIGHBOURS, CitedNeighbour, Rerank
from retro_ray.serve.completion_request import PromptText, StrictModel
from retro_ray.serve.limits import MAX_TEXTS
from retro_ray.serve.service import GenerationService
from retro_ray.serve.streaming import unless_disconnected


class RetrieveRequest(StrictModel):
    """Body of POST /v1/retrieve."""

    text: PromptText | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_TEXTS)]
    """One text or several; each is searched for as one chunk is, by what the embedder reads of it."""
    num_neighbours: int | None = Field(default=None, ge=1, le=MAX_NEIGHBOURS)
    """Per text; default: as many as the model was trained with."""
    rerank: Rerank | None = None
    """`overlap` puts neighbours that share words with the text first; default: as the service is set."""


class FoundNeighbours(BaseModel):
    """What was found for one text."""

    neighbours: tuple[CitedNeighbour, ...]
    """Nearest first."""
    missing_shards: tuple[int, ...]
    """Shards that did not answer: their chunks may have been nearer."""


class RetrieveReply(BaseModel):
    """Answer of POST /v1/retrieve."""

    object: Literal["list"] = "list"
    data: list[FoundNeighbours]
    """One entry per text, in their order."""


def add_retrieval(router: APIRouter, service: GenerationService, max_deadline_s: float) -> None:
    """The route of retrieval; what takes longer than `max_deadline_s` is given up."""

    @router.post("/v1/retrieve")
    async def retrieve(body: RetrieveRequest, request: Request) -> RetrieveReply:
        """The nearest chunks of the database."""
        texts = [body.text] if isinstance(body.text, str) else body.text
        search = service.retrieve(texts, body.num_neighbours, body.rerank)
        try:
            found = await unless_disconnected(request, asyncio.wait_for(search, max_deadline_s))
        except TimeoutError as error:
            raise DeadlineError(f"nothing was retrieved within {max_deadline_s:g} s: search for fewer texts") from error
        return RetrieveReply(
            data=[FoundNeighbours(neighbours=one.neighbours, missing_shards=one.missing_shards) for one in found]
        )
