"""One index shard as named, detached Ray actors, its replicas, that jobs, training and services share."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from retro_ray.database.format import Manifest, fingerprint, read_manifest
from retro_ray.index.exact import threads_at_most
from retro_ray.ray_session import NAMESPACE, num_cluster_cpus
from retro_ray.retrieval.answering import ServedShard
from retro_ray.retrieval.coalescing import Coalescer
from retro_ray.retrieval.direct import DirectServer, Endpoint
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest
from retro_ray.retrieval.placement import choose_node
from retro_ray.retrieval.wire import answer_to_bytes, request_from_bytes

logger = logging.getLogger(__name__)

SHARD_RESOURCE = "retro_shard"
"""Custom Ray resource of the nodes meant for shards; where no node offers it, shards go anywhere."""
_QUERIES_PER_BATCH = 4096
_MAX_CONCURRENCY = 64
"""Requests that wait in an actor at the same time; more wait before it."""
_ASK_NODE_TIMEOUT_S = 1.0


class ShardActor:
    """Serves one shard; requests that arrive while a batch is searched form the next one.

    Threads wait for their answers here: they take a third less processor time than asyncio for it.
    """

    def __init__(self, directory: str, shard: int, num_threads: int, mmap: bool, pinned: dict[str, Any] | None) -> None:
        manifest = None if pinned is None else Manifest.from_dict(pinned)
        self._served = ServedShard(Path(directory), shard, pinned=manifest, mmap=mmap)
        self._team = None
        if num_threads > 1:
            # Always the same thread: OpenMP keeps a team of threads for each one that calls it.
            self._team = ThreadPoolExecutor(1, "retro-ray-search", faiss.omp_set_num_threads, (num_threads,))
        self._batches = Coalescer[CandidateRequest, CandidateAnswer](
            self._answer,
            group_of=ServedShard.group_of,
            size_of=lambda request: len(request.queries),
            max_batch_size=_QUERIES_PER_BATCH,
        )
        self._direct = DirectServer(ray.util.get_node_ip_address(), self._search_in_bytes)

    def search(self, request: CandidateRequest | bytes) -> CandidateAnswer | bytes:
        """The candidates for a request; in bytes for one in bytes (see retrieval/wire.py)."""
        return self._search_in_bytes(request) if isinstance(request, bytes) else self._search(request)

    def endpoint(self) -> Endpoint:
        """Where requests in bytes are answered as well, without Ray."""
        return self._direct.endpoint

    def _search_in_bytes(self, message: bytes) -> bytes:
        return answer_to_bytes(self._search(request_from_bytes(message)))

    def _search(self, request: CandidateRequest) -> CandidateAnswer:
        return dataclasses.replace(self._batches.answer(request), num_queued=self._batches.num_waiting)

    def _answer(self, requests: Sequence[CandidateRequest]) -> list[CandidateAnswer]:
        if self._team is not None:
            return self._team.submit(self._served.answer, requests).result()
        with threads_at_most(1):
            return self._served.answer(requests)

    def ready(self) -> CandidateAnswer:
        """Answers once the shard is loaded."""
        return CandidateAnswer(self._served.refresh(), None)

    def refresh(self, generation: int) -> int:
        """Load what has been committed, `generation` or later; returns which one is held now."""
        return self._served.refresh(generation).generation

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


@dataclasses.dataclass(frozen=True)
class ReplicaName:
    """The name of an actor, and what it says."""

    directory: Path
    """Of the database."""
    shard: int
    replica: int
    build: str | None = None
    """Of a pinned actor: the build that it serves before it is committed."""

    def is_sibling_of(self, other: ReplicaName) -> bool:
        """Whether both serve the same shard."""
        return self != other and self == dataclasses.replace(other, replica=self.replica)

    def __str__(self) -> str:
        build = "" if self.build is None else f"{self.build}-"
        return f"{_prefix(self.directory)}{build}{self.shard:05d}-{self.replica}"


def start_replica(
    name: ReplicaName, *, pinned: Manifest | None, mmap: bool, num_shards: int, placed: dict[ReplicaName, str]
) -> Any:
    """Handle of an actor: found by name, or started.

    Args:
        name: which one.
        pinned: the manifest that it is to serve, for ever; None: what is committed.
        mmap: leave its files on the disk.
        num_shards: of the database.
        placed: nodes of the replicas that this process has started; grows by this one.
    """
    nodes = _shard_nodes()
    taken = {node for other, node in placed.items() if other.is_sibling_of(name)} | _nodes_of(name, placed)
    node = choose_node(name.shard, name.replica, nodes, taken)
    placed[name] = node
    resources = {SHARD_RESOURCE: 0.001} if SHARD_RESOURCE in ray.cluster_resources() else {}
    threads = max(1, num_cluster_cpus() // len(nodes) // -(-num_shards // len(nodes)))
    actor: Any = ray.remote(ShardActor)
    return actor.options(
        name=str(name),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources=resources,
        max_restarts=-1,
        max_task_retries=0,  # a client asks another replica at once, or decides to wait
        max_concurrency=_MAX_CONCURRENCY,
        enable_task_events=False,  # every search would be reported to the cluster's head
        # Ray starts it again on its node. When that is gone, a client chooses another, as it does here.
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(str(name.directory.absolute()), name.shard, threads, mmap, None if pinned is None else pinned.to_dict())


def refresh_shard_actors(directory: Path, timeout_s: float = 60.0) -> int:
    """Have the actors of a database load what has been committed; returns how many have.

    Actors would notice by themselves before their next answer; after this, they have loaded it.
    Those of shards that are no more are stopped.

    Raises:
        DatabaseError: there is no database.
    """
    manifest = read_manifest(directory)
    calls = []
    for name, replica in _running(directory):
        if replica.build is not None:
            continue
        if replica.shard >= manifest.num_shards:
            _stop(name)
            continue
        try:
            calls.append(ray.get_actor(name, namespace=NAMESPACE).refresh.remote(manifest.generation))
        except ValueError:
            continue  # it ended between the listing and here
    done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    if late:
        logger.warning("%d shard actors have not loaded generation %d yet", len(late), manifest.generation)
    num_refreshed = 0
    for call in done:
        try:
            ray.get(call)
            num_refreshed += 1
        except RayError as error:
            logger.warning("a shard actor did not load generation %d: %s", manifest.generation, error)
    return num_refreshed


def stop_shard_actors(directory: Path, *, pinned_only: bool = False) -> int:
    """Stop the shard actors of a home, or those of its builds alone; returns how many."""
    names = [name for name, replica in _running(directory) if replica.build is not None or not pinned_only]
    return sum(_stop(name) for name in names)


def _stop(name: str) -> bool:
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        return False  # it has ended by itself
    return True


def _running(directory: Path) -> Iterator[tuple[str, ReplicaName]]:
    """Names of the actors of a home, and what they say."""
    pattern = re.compile(re.escape(_prefix(directory)) + r"(?:(.+)-)?(\d{5,})-(\d+)")
    entries: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    for entry in entries:
        if entry["namespace"] == NAMESPACE and (match := pattern.fullmatch(entry["name"])):
            build, shard, replica = match.groups()
            yield entry["name"], ReplicaName(directory, int(shard), int(replica), build)


def _prefix(directory: Path) -> str:
    return f"shard-{fingerprint(str(directory.absolute()))[:8]}-"


def _shard_nodes() -> list[str]:
    """Ids of the nodes for shards: those that offer the resource, else those with processors, else any."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    for resource in (SHARD_RESOURCE, "CPU"):
        if meant := [node["NodeID"] for node in alive if node["Resources"].get(resource, 0) > 0]:
            return meant
    return [node["NodeID"] for node in alive]


def _nodes_of(name: ReplicaName, placed: dict[ReplicaName, str]) -> set[str]:
    """Nodes of the running replicas of the same shard that this process has not started."""
    calls = []
    for other, replica in _running(name.directory):
        if replica.is_sibling_of(name) and replica not in placed:
            try:
                calls.append(ray.get_actor(other, namespace=NAMESPACE).node_id.remote())
            except ValueError:
                continue
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=_ASK_NODE_TIMEOUT_S) if calls else ([], [])
    nodes = set()
    for call in done:
        try:
            nodes.add(ray.get(call))
        except RayError:
            continue  # it is being started again: where, its name says to whoever starts it
    return nodes
