"""One index shard as a named, detached Ray actor that jobs, training and services share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray

from retro_ray.database.format import Manifest, fingerprint
from retro_ray.database.store import Database
from retro_ray.ray_session import NAMESPACE, num_cluster_cpus
from retro_ray.retrieval.local import ShardSearcher
from retro_ray.retrieval.retriever import NeighbourSet

SHARD_RESOURCE = "retro_shard"
"""Custom Ray resource of the nodes meant for shards; where no node offers it, shards go anywhere."""
_MAX_TASK_RETRIES = 3


class ShardServer:
    """Answers searches of one shard: neighbours, their tokens and documents in one round trip."""

    def __init__(self, directory: str, manifest: dict[str, Any], shard: int, num_threads: int) -> None:
        # The manifest comes with the call: the one on disk may meanwhile be a later version's.
        faiss.omp_set_num_threads(num_threads)
        self._searcher = ShardSearcher.open(Database(Path(directory), Manifest.from_dict(manifest)), shard)

    def search(self, queries: np.ndarray, k: int) -> NeighbourSet:
        return self._searcher.search(queries, k)

    def search_ids(
        self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._searcher.search_ids(queries, k, excluded_ids)

    def ready(self) -> bool:
        """Answers once the shard is loaded."""
        return True


def actor_prefix(directory: Path) -> str:
    """Start of the names of all shard actors of a home's database, whatever its version."""
    return f"shard-{fingerprint(str(directory.absolute()))[:8]}-"


def shard_actor(database: Database, shard: int) -> Any:
    """Handle of the actor of one shard of this version of the database: found by name, or started."""
    manifest = database.manifest
    name = f"{actor_prefix(database.directory)}{manifest.version}-{shard:05d}"
    resources = {SHARD_RESOURCE: 0.001} if SHARD_RESOURCE in ray.cluster_resources() else {}
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    threads = max(1, num_cluster_cpus() // num_nodes // -(-len(manifest.segments) // num_nodes))
    actor = ray.remote(num_cpus=0, resources=resources, max_restarts=-1, max_task_retries=_MAX_TASK_RETRIES)(
        ShardServer
    )
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy="SPREAD",
    ).remote(str(database.directory.absolute()), manifest.to_dict(), shard, threads)


def stop_shard_actors(directory: Path, except_version: str | None = None) -> int:
    """Stop the shard actors of a home's database, but for one version's; returns how many."""
    prefix = actor_prefix(directory)
    stopped = 0
    entries: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    for entry in entries:
        name = entry["name"]
        if entry["namespace"] != NAMESPACE or not name.startswith(prefix):
            continue
        if except_version is not None and name.startswith(f"{prefix}{except_version}-"):
            continue
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
        except ValueError:
            continue  # it ended between the listing and here
        stopped += 1
    return stopped
