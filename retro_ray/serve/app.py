"""The Serve deployment: a replica generates with a run's newest checkpoint against the shard actors."""

# No `from __future__ import annotations`: Serve reads the builder's annotation as a class.
import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import click
import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ray import serve
from ray.serve import Application

from retro_ray.config import default_home
from retro_ray.database.store import Database
from retro_ray.errors import RetroRayError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.precision import bf16_is_fast
from retro_ray.ray_session import connect, connect_if_running
from retro_ray.retrieval.retriever import ChunkRetriever
from retro_ray.retrieval.sharded import ShardedRetriever
from retro_ray.serve.api import Health, build_api
from retro_ray.training.checkpoint import find_checkpoint, load_model, require_match
from retro_ray.training.run_folder import run_directory

logger = logging.getLogger(__name__)


class ServeSettings(BaseModel):
    """Arguments of `serve run retro_ray.serve:app NAME=VALUE ...`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=default_home)
    """Folder of the database and the training runs."""
    run: str = "default"
    """Training run whose newest checkpoint is served; also the model's name in the API."""
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, gt=0)
    """Of each replica; without a GPU it decodes with so many threads, at least one."""
    num_gpus: float = Field(default=0, ge=0)
    """Of each replica; above 0, model and embedder run on the GPU."""
    max_batch_size: int = Field(default=8, ge=1)
    """Completions that a replica decodes together."""

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()


@serve.deployment()
@serve.ingress()
class GenerationService:
    """One replica: engine, embedder and retriever in one process, the shards in their own actors.

    The engine runs in one thread, so that the event loop stays free to take requests in; those that
    come in meanwhile are decoded together as the next batch.
    """

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        device = torch.device("cuda" if settings.num_gpus else "cpu")
        database = Database.open(settings.home)
        manifest = database.manifest
        model, _, meta = load_model(run_directory(settings.home, settings.run), manifest, device)
        if bf16_is_fast(device):
            model = model.bfloat16()
        shards = ShardedRetriever(database)
        shards.wait_until_ready()
        retriever = ChunkRetriever.open(database, shards, device)
        self._engine = GenerationEngine(model, database.tokenizer, retriever)
        self._health = Health(model=settings.run, checkpoint_step=meta.step, database_version=manifest.version)
        self._decode_batch.set_max_batch_size(settings.max_batch_size)  # pyright: ignore[reportAttributeAccessIssue]
        logger.info("serving step %d of run %s with database %s", meta.step, settings.run, manifest.version)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)

    def health(self) -> Health:
        return self._health

    def check_request(self, request: GenerationRequest) -> None:
        self._engine.start(request)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        return await self._decode_batch(request)

    @serve.batch(batch_wait_timeout_s=0.005)
    async def _decode_batch(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        return await asyncio.to_thread(self._engine.generate, requests)


def app(arguments: dict[str, Any]) -> Application:
    """The application builder of `serve run retro_ray.serve:app [NAME=VALUE ...]`; see ServeSettings."""
    try:
        settings = ServeSettings.model_validate(arguments)
        # What a replica would fail at after a minute, in one line before anything is started.
        manifest = Database.open(settings.home).manifest
        _, meta = find_checkpoint(run_directory(settings.home, settings.run))
        require_match(meta, manifest)
    except ValidationError as error:
        raise click.ClickException(_one_line(error)) from error
    except RetroRayError as error:
        raise click.ClickException(str(error)) from error
    _start_ray_if_none_runs()
    deployment = GenerationService.options(
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        # Twice a batch: one is decoded while the next one gathers. What is beyond waits at the proxy,
        # and is turned away when too much waits.
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=16 * settings.max_batch_size,
    )
    return deployment.bind(settings)


def _one_line(error: ValidationError) -> str:
    """The first wrong argument: its name, its value and what it must be."""
    first = error.errors()[0]
    name = first["loc"][0]
    if first["type"] == "extra_forbidden":
        return f"unknown argument {name}; there are {', '.join(ServeSettings.model_fields)}"
    return f"{name}={first['input']}: {first['msg']}"


def _start_ray_if_none_runs() -> None:
    """`serve run` connects to a running cluster in a way of its own, but starts none unless told so."""
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        return
    if connect_if_running():
        ray.shutdown()
    else:
        connect()
