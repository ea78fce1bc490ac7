"""Does a query get lost, or a wrong answer, while shard actors are killed and a node goes away?

Three Ray nodes run on this machine. Clients search a database through its shard actors without a
pause, and every answer is compared with the one that was given before anything happened. Every few
seconds an actor dies. First with two replicas of every shard, where one node is removed as well;
then with one replica and the policy `partial`, where answers must say what they lack.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from benchmarks.environment import EQUAL_SHARES, LOOPBACK, run_with
from retro_ray.building.build import DatabaseBuilder
from retro_ray.command_line import parse, run
from retro_ray.config import CorpusConfig, DatabaseConfig, RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.ray_session import NAMESPACE
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.retrieval.shard_actor import ReplicaName, stop_shard_actors
from retro_ray.retrieval.sharded import ShardedRetriever

_K = 10
_NUM_QUERIES = 256
_NUM_SHARDS = 4
_NUM_NODES = 3
_OBJECT_STORE_BYTES = 150 << 20
_QUIET_S = 5.0
_KILL_KINDS = ("crash", "kill", "kill for good")
_SETTLE_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class FaultsBenchmark:
    """Kill shard actors and remove a node while clients search."""

    home: Path = Path("results/faults")
    """Where a small database is built, and found again the next time."""
    seconds: float = 60.0
    """How long faults happen, with two replicas and again with one."""
    kill_every_s: float = 3.0
    """Pause between deaths of actors."""
    num_clients: int = 8
    """Threads that search, each with a retriever of its own, one query at a time."""
    seed: int = 0
    """Of what is killed when, and of what is asked."""
    json: Path | None = None
    """Write the metrics to this file."""


@dataclass
class Observations:
    """What clients saw in one phase."""

    latencies_s: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Errors that clients got in place of an answer."""
    wrong: int = 0
    """Answers that hold what they should not, or lack what the shards that answered have."""
    incomplete: int = 0
    """Answers that say that shards are missing."""
    unmarked_incomplete: int = 0
    """Answers that lack something and do not say so."""

    def milliseconds(self, percentile: float) -> float:
        return float(np.percentile(self.latencies_s, percentile)) * 1e3 if self.latencies_s else float("nan")


class Truth:
    """What undisturbed searches answer, and how an answer compares to that."""

    def __init__(self, database: Database, seed: int) -> None:
        rng = np.random.default_rng(seed)
        keys = np.concatenate([store.keys for store in database.segments])
        chosen = keys[rng.integers(0, len(keys), _NUM_QUERIES)]
        self.queries = (chosen + 0.05 * rng.standard_normal(chosen.shape)).astype(np.float32)
        retriever = LocalRetriever.open(database)
        self._answers = [retriever.search(self.queries[row : row + 1], _K) for row in range(_NUM_QUERIES)]
        self._all = retriever.search_ids(self.queries, database.manifest.num_chunks)[1]
        self._shard_of = np.concatenate(
            [np.full(segment.num_chunks, segment.shard) for segment in database.manifest.segments]
        )

    def note(self, row: int, answer: NeighbourSet, seen: Observations) -> None:
        """Compare the answer to query `row`."""
        if answer.missing_shards:
            seen.incomplete += 1
            everything = self._all[row]
            there = everything[~np.isin(self._shard_of[everything], answer.missing_shards)][:_K]
            seen.wrong += not np.array_equal(answer.chunk_ids[0, : len(there)], there)
        elif not self._equals(answer, self._answers[row]):
            lacks = not np.isin(self._answers[row].chunk_ids, answer.chunk_ids).all()
            seen.unmarked_incomplete += lacks
            seen.wrong += 1

    @staticmethod
    def _equals(found: NeighbourSet, expected: NeighbourSet) -> bool:
        arrays = ("distances", "chunk_ids", "tokens", "mask")
        same = all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in arrays)
        return same and found.documents == expected.documents


class Clients:
    """Threads that search until they are stopped; `seen` may be replaced meanwhile."""

    def __init__(self, truth: Truth, database: Database, config: RetrievalConfig, num_clients: int) -> None:
        self.seen = Observations()
        self._truth = truth
        self._turn = itertools.count()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(ShardedRetriever(database, config),), daemon=True)
            for _ in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, retriever: ShardedRetriever) -> None:
        while not self._stopping.is_set():
            row, seen = next(self._turn) % _NUM_QUERIES, self.seen
            start = time.perf_counter()
            try:
                answer = retriever.search(self._truth.queries[row : row + 1], _K)
            except Exception as error:  # what a client sees is what is measured
                seen.lost.append(repr(error)[:300])
                continue
            seen.latencies_s.append(time.perf_counter() - start)
            self._truth.note(row, answer, seen)

    def stop(self) -> None:
        """Returns once every query has its answer."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()


class Faults:
    """Kills actors of a database."""

    def __init__(self, database: Database, num_replicas: int, rng: random.Random) -> None:
        self.num_kills = 0
        self._names = [
            ReplicaName(database.directory, shard, replica)
            for shard in range(database.manifest.num_shards)
            for replica in range(num_replicas)
        ]
        self._rng = rng

    def kill_one(self) -> None:
        """Any actor, in any of three ways; one that is being started already is left alone."""
        name = self._rng.choice(self._names)
        kind = _KILL_KINDS[self.num_kills % len(_KILL_KINDS)]
        try:
            actor: Any = ray.get_actor(str(name), namespace=NAMESPACE)
            if kind == "crash":
                pid: Any = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=1.0)
                os.kill(pid, signal.SIGKILL)
            else:
                ray.kill(actor, no_restart=kind == "kill for good")
        except (ValueError, RayError, ProcessLookupError):
            return
        self.num_kills += 1

    def nodes(self) -> dict[int, list[str]]:
        """Nodes of the replicas of every shard, once all of them are back."""
        nodes: dict[int, list[str]] = {}
        for name in self._names:
            nodes.setdefault(name.shard, []).append(_node_of(name))
        return nodes


def _node_of(name: ReplicaName) -> str:
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        try:
            actor: Any = ray.get_actor(str(name), namespace=NAMESPACE)
            return str(ray.get(actor.node_id.remote(), timeout=10.0))
        except (ValueError, RayError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@contextmanager
def three_nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """A Ray cluster on the loopback, with small object stores; it ends with this."""
    arguments = {"object_store_memory": _OBJECT_STORE_BYTES, "node_ip_address": "127.0.0.1", "num_cpus": 2}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(**arguments) for _ in range(_NUM_NODES - 1)]
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def observe(
    benchmark: FaultsBenchmark, database: Database, truth: Truth, config: RetrievalConfig, lose_node: Any = None
) -> dict[str, Any]:
    """Let clients search while actors die; with `lose_node`, that is called half-way."""
    ShardedRetriever(database, config).wait_until_ready()
    faults = Faults(database, config.num_replicas, random.Random(benchmark.seed))
    faults.nodes()
    clients = Clients(truth, database, config, benchmark.num_clients)
    time.sleep(_QUIET_S)
    quiet, clients.seen = clients.seen, Observations()
    start = time.monotonic()
    while (passed := time.monotonic() - start) < benchmark.seconds:
        if lose_node is not None and passed > benchmark.seconds / 2:
            lose_node()
            lose_node = None
        faults.kill_one()
        time.sleep(benchmark.kill_every_s)
    seen, clients.seen = clients.seen, Observations()
    nodes = faults.nodes()  # who asks brings back what was killed for good
    clients.stop()
    after = clients.seen
    return {
        "queries": len(seen.latencies_s) + len(seen.lost),
        "kills": faults.num_kills,
        "lost": sum(len(phase.lost) for phase in (quiet, seen, after)),
        "wrong": sum(phase.wrong for phase in (quiet, seen, after)),
        "incomplete": seen.incomplete,
        "unmarked_incomplete": sum(phase.unmarked_incomplete for phase in (quiet, seen, after)),
        "p50_ms_quiet": quiet.milliseconds(50),
        "p99_ms_quiet": quiet.milliseconds(99),
        "p50_ms": seen.milliseconds(50),
        "p99_ms": seen.milliseconds(99),
        "max_ms": seen.milliseconds(100),
        "replicas_together": sum(len(places) - len(set(places)) for places in nodes.values()),
        "errors": seen.lost[:3],
    }


def measure(benchmark: FaultsBenchmark) -> dict[str, Any]:
    """Both settings, one after the other, on the same cluster."""
    home = benchmark.home.expanduser().absolute()
    with three_nodes() as (cluster, nodes):
        corpus = CorpusConfig(share=0.05)
        DatabaseBuilder(home, corpus, DatabaseConfig(num_shards=_NUM_SHARDS, tokenizer="train:4096")).run()
        database = Database.open(home)
        truth = Truth(database, benchmark.seed)
        try:
            two = observe(
                benchmark,
                database,
                truth,
                RetrievalConfig(num_replicas=2),
                lambda: cluster.remove_node(nodes[0], allow_graceful=False),
            )
            stop_shard_actors(database.directory)
            one = observe(benchmark, database, truth, RetrievalConfig(policy="partial"))
        finally:
            stop_shard_actors(database.directory)
    return {
        "chunks": database.manifest.num_chunks,
        "shards": database.manifest.num_shards,
        "clients": benchmark.num_clients,
        "lost": two["lost"],
        "wrong": two["wrong"],
        "unmarked_incomplete": one["unmarked_incomplete"],
        "p99_ms": two["p99_ms"],
        "two_replicas": two,
        "one_replica_partial": one,
    }


def as_table(metrics: dict[str, Any]) -> str:
    """For people: both settings side by side."""
    two, one = metrics["two_replicas"], metrics["one_replica_partial"]
    lines = [
        f"{metrics['chunks']:,} chunks in {metrics['shards']} shards, {metrics['clients']} clients, 3 nodes",
        f"{'':>22}  {'two replicas,':>16}  {'one replica,':>14}",
        f"{'':>22}  {'one node removed':>16}  {'partial':>14}",
    ]
    for name in (name for name in two if name != "errors"):
        lines.append(f"{name:>22}  {_rounded(two[name]):>16}  {_rounded(one[name]):>14}")
    errors: Sequence[str] = [*two["errors"], *one["errors"]]
    return "\n".join([*lines, *errors])


def _rounded(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def main(benchmark: FaultsBenchmark) -> None:
    """Measure and report."""
    logging.getLogger("retro_ray.retrieval").setLevel(logging.ERROR)  # every client would say what is missing
    metrics = measure(benchmark)
    print(as_table(metrics))
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(FaultsBenchmark, "python -m benchmarks.faults")
    run_with(LOOPBACK | EQUAL_SHARES, "benchmarks.faults")
    run(lambda: main(parsed))
