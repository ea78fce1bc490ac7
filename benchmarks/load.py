"""Does every request end as it should while replicas and shards are killed and the database is edited?

The real service, two replicas of it, on a Ray of its own, on loopback; clients over HTTP that complete,
stream, retrieve, leave in mid-stream and set short deadlines. A replica is killed, then a shard actor;
documents are added and deleted all the time. Ends with status 1 where a request hung, an answer was
malformed, an edit did not show, or a process was left over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.load_clients import WAYS, Client, Outcome
from benchmarks.load_edits import Editing, num_added_missing, num_deleted_seen
from benchmarks.load_home import require_home, sample_texts
from benchmarks.load_processes import WatchedProcess, memory_growth
from benchmarks.load_service import RunningService
from retro_ray.command_line import parse, run
from retro_ray.config import RetrievalPolicy

_CACHED_HOME = Path(__file__).parents[1] / "results" / "load-home"
_NUM_TEXTS = 200
_KILL_REPLICA_AT, _KILL_SHARD_AT, _EDIT_UNTIL = 0.3, 0.6, 0.9
"""Of the time."""
_CUT_OFF_S = 10.0
"""For so long after a replica was killed a request may still be sent to it."""
_MIB = 1 << 20
MUST_BE_ZERO = ("hung", "malformed", "unexplained_cuts", "added_missing", "deleted_seen", "leftover_processes")


@dataclass(frozen=True, kw_only=True)
class LoadBenchmark:
    """Clients of all kinds, failures of all kinds, and how every request ended."""

    clients: int = 32
    """At the same time."""
    seconds: float = 60.0
    """How long they ask; what has begun by then is still waited for."""
    home: Path | None = None
    """What is served; its database is edited while it is. Default: a copy of a small one, built first if need be."""
    policy: RetrievalPolicy = "partial"
    """What the service does where a shard does not answer."""
    deadline_s: float = 30.0
    """The service's, of every request that sets none. One that takes twice as long and 15 s hangs."""
    json: Path | None = None
    """Write the metrics to this file."""


@dataclass
class Story:
    """What happened, by time.monotonic."""

    started_s: float
    ended_s: float = 0.0
    killed_replica_s: float = float("inf")
    killed_shard_s: float = float("inf")


def measure(benchmark: LoadBenchmark) -> dict[str, Any]:
    """The metrics."""
    with tempfile.TemporaryDirectory(prefix="load-home-") as folder:
        home = benchmark.home
        if home is None:
            require_home(_CACHED_HOME)
            home = Path(shutil.copytree(_CACHED_HOME, Path(folder) / "home"))
        texts = sample_texts(home, _NUM_TEXTS)
        settings = {
            "num_replicas": 2,
            "max_deadline_s": benchmark.deadline_s,
            "drain_s": 5,
            "refresh_s": 1,
            "retrieval": {"policy": benchmark.policy, "timeout_s": 5},
        }
        with RunningService(home.expanduser().absolute(), settings) as service:
            outcomes, editing, story = asyncio.run(_load(benchmark, service, texts))
            memory = _memory(service, story)
            logs = service.logs()
            ready = httpx2.get(f"{service.url}/readyz", timeout=30).status_code == 200
    metrics = {**_counts(outcomes, story), **_speed(outcomes, story)}
    metrics |= {
        "edits": len(editing.documents),
        "edit_retries": dict(Counter(editing.failures)),
        "added_missing": num_added_missing(editing, outcomes),
        "deleted_seen": num_deleted_seen(editing, outcomes),
        "ready_at_the_end": ready,
        **memory,
        "leftover_processes": len(service.leftover),
        "leftover": service.leftover,
        "clients": benchmark.clients,
        "seconds": benchmark.seconds,
    }
    if logs:
        print(f"\nwarnings and errors of the replicas:\n{logs[-5000:]}", file=sys.stderr)
    return metrics


async def _load(
    benchmark: LoadBenchmark, service: RunningService, texts: Sequence[str]
) -> tuple[list[Outcome], Editing, Story]:
    """All clients, the edits and the killing side by side, until the last request has ended."""
    story = Story(time.monotonic())
    until_s = story.started_s + benchmark.seconds
    hung_after_s = 2 * benchmark.deadline_s + 15
    editing = Editing(service.url)
    clients = [
        Client(service.url, texts, hung_after_s, editing.text, seed=number) for number in range(benchmark.clients)
    ]

    async def kill(at: float, victims: Callable[[], list[WatchedProcess]]) -> float:
        await asyncio.sleep(at * benchmark.seconds)
        found = await asyncio.to_thread(victims)
        victim = random.Random(0).choice(found)
        print(f"{time.monotonic() - story.started_s:5.1f} s: killing {victim.title}", file=sys.stderr, flush=True)
        victim.process.kill()
        return time.monotonic()

    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(until_s))
        group.create_task(editing.run(story.started_s + _EDIT_UNTIL * benchmark.seconds))
        replica = group.create_task(kill(_KILL_REPLICA_AT, service.replicas))
        shard = group.create_task(kill(_KILL_SHARD_AT, service.shards))
    story.ended_s = time.monotonic()
    story.killed_replica_s, story.killed_shard_s = replica.result(), shard.result()
    return [outcome for client in clients for outcome in client.outcomes], editing, story


def _counts(outcomes: Sequence[Outcome], story: Story) -> dict[str, Any]:
    """How requests ended."""
    endings = Counter(outcome.ending for outcome in outcomes)
    cuts = [one for one in outcomes if one.ending == "cut"]
    by_the_kill = [one for one in cuts if one.started_s - _CUT_OFF_S <= story.killed_replica_s <= one.ended_s]
    clean = Counter(one.detail for one in outcomes if one.ending == "error")
    clean.update(f"cut with its replica: {one.detail}" for one in by_the_kill)
    partial_s = [one.ended_s - story.killed_shard_s for one in outcomes if one.ending == "partial"]
    return {
        "requests": len(outcomes),
        "by_way": {way: sum(one.way == way for one in outcomes) for way in WAYS},
        "answered": endings["answered"],
        "partial": endings["partial"],
        "left": endings["left"],
        "clean_errors": sum(clean.values()),
        "clean_errors_by_kind": dict(clean.most_common()),
        "hung": endings["hung"],
        "malformed": endings["malformed"],
        "malformed_kinds": dict(Counter(one.detail for one in outcomes if one.ending == "malformed")),
        "unexplained_cuts": len(cuts) - len(by_the_kill),
        "partial_for_s": max(partial_s, default=0.0),
    }


def _speed(outcomes: Sequence[Outcome], story: Story) -> dict[str, Any]:
    """How fast, for those who waited for their answer."""
    done = [one for one in outcomes if one.ending in ("answered", "partial") and one.way != "short deadline"]
    first_s = [one.first_text_s - one.started_s for one in done if one.first_text_s is not None]
    metrics = {"tokens_per_s": sum(one.num_tokens for one in done) / (story.ended_s - story.started_s)}
    for name, seconds in (
        ("time_to_first_token", first_s),
        ("completion", [one.ended_s - one.started_s for one in done if one.way in ("plain", "stream")]),
        ("retrieve", [one.ended_s - one.started_s for one in done if one.way == "retrieve"]),
    ):
        for percent in (50, 99):
            metrics[f"{name}_p{percent}_s"] = float(np.percentile(seconds, percent)) if seconds else float("nan")
    return metrics


def _memory(service: RunningService, story: Story) -> dict[str, Any]:
    """Of replicas and shard actors; growth is that of the worst one that lived from beginning to end."""
    metrics: dict[str, Any] = {}
    warm_s = story.started_s + 0.2 * (story.ended_s - story.started_s)
    growths = []
    for name, processes in (("replica", service.replicas()), ("shard", service.shards())):
        growth = [memory_growth(one, warm_s, story.ended_s) for one in processes]
        growths += [one for one in growth if one is not None]
        metrics[f"{name}_mib"] = [round(one.memory[-1][1] / _MIB) for one in processes if one.memory]
    metrics["memory_growth"] = max(growths, default=float("nan"))
    return metrics


def _print(metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if isinstance(value, dict):
            print(f"{name:>24}")
            for key, count in value.items():
                print(f"{count:>26}  {key}")
        else:
            print(f"{name:>24}  {value if isinstance(value, bool | list) else f'{value:,.5g}'}")


def main(benchmark: LoadBenchmark) -> None:
    """Measure and report."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line per request
    metrics = measure(benchmark)
    _print(metrics)
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    broken = [f"{name} = {metrics[name]}" for name in MUST_BE_ZERO if metrics[name]]
    if broken or not metrics["ready_at_the_end"]:
        print(f"not as it should be: {', '.join(broken) or 'not ready at the end'}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    parsed = parse(LoadBenchmark, "python -m benchmarks.load")
    run(lambda: main(parsed))
