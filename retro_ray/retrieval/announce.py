"""Telling the actors that serve a database that it was edited."""

from __future__ import annotations

import logging
from pathlib import Path

import ray
from ray.exceptions import RayError

from retro_ray.errors import ConfigError
from retro_ray.ray_session import connect_if_running
from retro_ray.retrieval.shard_actor import refresh_shard_actors

logger = logging.getLogger(__name__)


def announce_commit(directory: Path) -> None:
    """Have the shard actors of a database load what was committed, where Ray runs.

    They would notice by themselves before they answer next, so that nothing depends on this but how
    long that answer takes: what goes wrong here is logged.
    """
    try:
        if ray.is_initialized() or connect_if_running():
            refresh_shard_actors(directory)
    except (RayError, ConfigError, ConnectionError) as error:
        logger.warning("the shard actors were not told: %s", error)
