"""The Serve deployment: a replica generates with a run's newest checkpoint against the shard actors."""

# No `from __future__ import annotations`: Serve reads the builder's annotation as a class.
import logging
import os
from collections.abc import Sequence
from typing import Any

import click
import ray
import torch
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve import Application, metrics
from ray.serve.config import AutoscalingConfig

from retro_ray.database.store import Database
from retro_ray.errors import RetroRayError
from retro_ray.ray_session import connect, connect_if_running
from retro_ray.retrieval.retriever import ChunkRetriever
from retro_ray.retrieval.sharded import ShardedRetriever
from retro_ray.serve.api import ApiSettings, build_api
from retro_ray.serve.keys import ApiKey, KeyRing, read_keys
from retro_ray.serve.replica import Replica
from retro_ray.serve.settings import ServeSettings
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
        shards = ShardedRetriever(database)
        shards.wait_until_ready()
        search = ChunkRetriever.open(database, shards, device)
        self._replica = Replica(settings, database, search, metrics, device)
        self._api_settings = ApiSettings(
            keys=KeyRing(keys),
            # HAProxy in place of Serve's proxy hides whom a request comes from.
            peer_is_known=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") != "1",
            max_deadline_s=settings.max_deadline_s,
            log_bodies=settings.log_bodies,
            send_request_id=False,  # Serve's proxy does
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._replica, settings=self._api_settings)


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
    if not first["loc"]:
        return f"{error.title}: {first['msg']}"
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
