"""What is served, and whether it answers: /v1/models, /healthz, /readyz."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from retro_ray.serve.service import GenerationService


class ModelCard(BaseModel):
    """The served model, in OpenAI's form; below `owned_by` what is ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When its checkpoint was taken up, seconds since 1970."""
    owned_by: Literal["retro_ray"] = "retro_ray"
    checkpoint_step: int
    context_length: int
    """Tokens of prompt and completion together."""
    chunk_length: int
    """After so many tokens the neighbours are retrieved anew."""
    num_neighbours: int
    """Per chunk, where a request does not say."""
    database_version: str


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of GET /healthz."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Answer of GET /readyz."""

    status: Literal["ready", "not ready"]
    problems: list[str]
    """One line each; empty if it is ready."""


def add_models(router: APIRouter, service: GenerationService) -> None:
    """The route that says what is served."""

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model, and the database version it reads from."""
        model = service.model()
        card = ModelCard(
            id=model.name,
            created=model.created,
            checkpoint_step=model.checkpoint_step,
            context_length=model.context_length,
            chunk_length=model.chunk_length,
            num_neighbours=model.num_neighbours,
            database_version=model.database_version,
        )
        return ModelList(data=[card])


def add_probes(router: APIRouter, service: GenerationService) -> None:
    """The routes for whoever watches over the service; they need no key and tell no content."""

    @router.get("/healthz")
    async def healthz() -> Health:
        """Answers as long as the process is alive."""
        return Health()

    @router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready"}})
    async def readyz(response: Response) -> Readiness:
        """Whether requests can be answered now: model loaded, shards answering, not shutting down."""
        problems = list(service.problems())
        response.status_code = 503 if problems else 200
        return Readiness(status="not ready" if problems else "ready", problems=problems)
