"""The Serve deployment: a replica generates with a run's newest checkpoint against the shard actors."""

# No `from __future__ import annotations`: Serve reads the builder's annotation as a class.
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import ray
import torch
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import Application, metrics
from ray.serve.config import AutoscalingConfig

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.format import fingerprint
from retro_ray.database.store import Database
from retro_ray.errors import BusyError, RetroRayError
from retro_ray.openmp import computing_alone
from retro_ray.ray_session import NAMESPACE, connect, connect_if_running, user_error
from retro_ray.retrieval.announce import announce_commit
from retro_ray.retrieval.retriever import ChunkRetriever
from retro_ray.retrieval.sharded import ShardedRetriever
from retro_ray.serve.api import ApiSettings, build_api
from retro_ray.serve.editing import HomeDocuments
from retro_ray.serve.keys import ApiKey, KeyRing, read_keys
from retro_ray.serve.replica import Replica
from retro_ray.serve.settings import ServeSettings
from retro_ray.text.corpus import Document
from retro_ray.training.checkpoint import find_checkpoint, require_match
from retro_ray.training.run_folder import run_directory

_ROOM_BESIDE_COMPLETIONS = 64
"""Requests of a replica at the same time that are no completions: probes, retrievals, pages."""
_SHUTDOWN_MARGIN_S = 5.0


@serve.deployment()
@serve.ingress()
class GenerationService:
    """One replica: engine, embedder and retriever in one process, the shards in their own actors."""

    def __init__(self, settings: ServeSettings, keys: Sequence[ApiKey]) -> None:
        _log_beside_serve()
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        device = torch.device("cuda" if settings.num_gpus else "cpu")
        database = Database.open(settings.home)
        shards = ShardedRetriever(database, settings.retrieval)
        shards.wait_until_ready()
        with computing_alone():
            search = ChunkRetriever.open(database, shards, device)
        self._replica = Replica(settings, database, search, metrics, device)
        self._documents = HomeDocuments(settings.home, ActorEdits(settings.home))
        self._api_settings = ApiSettings(
            keys=KeyRing(keys),
            # HAProxy in place of Serve's proxy hides whom a request comes from.
            peer_is_known=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") != "1",
            max_deadline_s=settings.max_deadline_s,
            log_bodies=settings.log_bodies,
            send_request_id=False,  # Serve's proxy does
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._replica, self._documents, self._api_settings)

    def check_health(self) -> None:
        """Serve calls it, and replaces a replica for which it raises."""
        self._replica.check_alive()


class DocumentEditorActor:
    """Edits a home's database for all replicas, in a process of its own: embedding there holds up no request."""

    def __init__(self, home: str) -> None:
        self._editor = DatabaseEditor(Path(home), announce=announce_commit)

    def update(self, documents: list[Document]) -> None:
        self._editor.update(documents)

    def delete(self, document_ids: list[str]) -> None:
        self._editor.delete(document_ids)


class ActorEdits:
    """Edits through the actor of a home, which the first edit starts and which ends with the replica that did."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._actor: Any = None

    async def update(self, documents: Sequence[Document]) -> None:
        await self._edit("update", list(documents))

    async def delete(self, document_ids: Sequence[str]) -> None:
        await self._edit("delete", list(document_ids))

    async def _edit(self, method: str, what: list[Any]) -> None:
        if self._actor is None:
            name = f"editor-{fingerprint(str(self._home))[:8]}"
            actor = ray.remote(num_cpus=0)(DocumentEditorActor)
            self._actor = actor.options(name=name, namespace=NAMESPACE, get_if_exists=True).remote(str(self._home))
        try:
            await getattr(self._actor, method).remote(what)
        except RayActorError as error:
            self._actor = None
            raise BusyError("the process that edits the database has ended and is started again: try again") from error
        except RayError as error:
            raise user_error(error, self._home) or error from error


def app(arguments: dict[str, Any]) -> Application:
    """The application builder of `serve run retro_ray.serve:app [NAME=VALUE ...]`; see ServeSettings."""
    try:
        settings = ServeSettings.model_validate(arguments)
        options = _scaling(settings)
        # What a replica would fail at after a minute, in one line before anything is started.
        keys = read_keys(settings.api_keys_file)
        manifest = Database.open(settings.home).manifest
        _, meta = find_checkpoint(run_directory(settings.home, settings.run))
        require_match(meta, manifest)
    except ValidationError as error:
        raise click.ClickException(_one_line(error)) from error
    except RetroRayError as error:
        raise click.ClickException(str(error)) from error
    _start_ray_if_none_runs()
    deployment = GenerationService.options(
        **options,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        # A replica refuses by itself what it has no room for, and says when to come back. What does not even get to
        # one is refused by the proxy.
        max_ongoing_requests=settings.max_batch_size + settings.max_queued + _ROOM_BESIDE_COMPLETIONS,
        max_queued_requests=settings.max_queued,
        backpressure_config={"status_code": 503, "retry_after_s": 1.0},
        graceful_shutdown_timeout_s=settings.drain_s + _SHUTDOWN_MARGIN_S,
        # RequestLog writes one line per request; Serve's would be a second.
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(settings, keys)


def _scaling(settings: ServeSettings) -> dict[str, Any]:
    """The deployment's options of how many replicas there are.

    Raises:
        ValidationError: Serve does not take these.
    """
    if settings.autoscaling_config is None:
        return {"num_replicas": settings.num_replicas}
    return {"autoscaling_config": AutoscalingConfig.model_validate(settings.autoscaling_config)}


def _log_beside_serve() -> None:
    """What retro_ray logs in a replica goes where Serve's own lines go, with the ids of replica and request."""
    ours, serves = logging.getLogger("retro_ray"), logging.getLogger("ray.serve")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    for handler in serves.handlers:
        ours.addHandler(handler)


def _one_line(error: ValidationError) -> str:
    """The first wrong argument: its name, its value and what it must be."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not name:
        return f"{error.title}: {message}"
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown argument {name}"
    if first["type"] == "extra_forbidden":
        return f"unknown argument {name}; there are {', '.join(ServeSettings.model_fields)}"
    return f"{name}={first['input']}: {message}"


def _start_ray_if_none_runs() -> None:
    """`serve run` connects to a running cluster in a way of its own, but starts none unless told so."""
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        return
    if connect_if_running():
        ray.shutdown()
    else:
        connect()
