"""How fast and how well are neighbours found, beside exact search and the index that a peer ships?

Queries are chunks of documents that are held out of the keys. Two databases in shards are measured, their indexes
chosen as a build would: "codes", as it comes, and "ours", with so much memory granted that a graph may be chosen. Each
is searched undivided, in its shards in this process, and over shard actors. (A graph is a shard's own: undivided it is
another one, with a parameter of its own.) All contenders take turns on the same queries in one run; medians count.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.key_database import KeyDatabase, cached_keys
from retro_ray.command_line import parse, run
from retro_ray.index.curve import curve_table, plot_curve
from retro_ray.ray_session import connect
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.shard_actor import stop_shard_actors
from retro_ray.retrieval.sharded import ShardedRetriever

_PEER_INDEX, _PEER_NPROBE = "IVF1024,PQ48", 32
_PEER_TRAINING_KEYS = 65_536
_K = 10
_NUM_ROUNDS = 5
_NUM_SINGLE_QUERIES = 400


@dataclass(frozen=True, kw_only=True)
class RetrievalBenchmark:
    """Queries per second and recall@10 of exact search, of the peers' index, and of ours with and without actors."""

    input: tuple[str, ...] = ("python-docs",)
    """Corpus whose chunks are the keys."""
    home: Path | None = None
    """Take keys and held-out queries from the database of this home in place of a corpus."""
    cache: Path = Path("results/keys")
    """Folder in which embedded keys are kept for the next run."""
    sizes: tuple[int, ...] = (50_000, 100_000, 200_000, 300_000)
    """Also measure databases of so many keys, as far as there are enough."""
    num_queries: int = 8_192
    num_shards: int = 4
    target_recall: float = 0.95
    bytes_per_chunk: int = 4096
    """Granted to the index of "ours"."""
    json: Path | None = None
    """Write the metrics to this file."""
    plots: Path = Path("results")
    """Folder for the pictures."""


Search = Callable[[np.ndarray], np.ndarray]
"""From queries, float32 [Q, D], to the chunk_ids found, int64 [Q, 10]."""


def measure(benchmark: RetrievalBenchmark) -> dict[str, Any]:
    """The metrics."""
    keys, held_out = cached_keys(benchmark.input, benchmark.home, benchmark.cache)
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(held_out), min(benchmark.num_queries, len(held_out)), replace=False)
    queries = np.ascontiguousarray(held_out[np.sort(chosen)])
    num_threads = os.cpu_count() or 1
    faiss.omp_set_num_threads(num_threads)
    shape = keys, held_out, benchmark.target_recall, benchmark.num_shards
    with ExitStack() as stack:
        ours = _Searches(stack, KeyDatabase.build(*shape, benchmark.bytes_per_chunk))
        codes = _Searches(stack, KeyDatabase.build(*shape))
        contenders: dict[str, Search] = {
            "exact": _exact(keys),
            "ivfpq": _peer(keys),
            **{f"ours {name}": search for name, search in ours.by_name.items()},
            **{f"codes {name}": search for name, search in codes.by_name.items()},
        }
        qps, found = _in_turns(contenders, queries)
        single_ms = {
            name: _single_query_ms(contenders[name], queries[:_NUM_SINGLE_QUERIES])
            for name in ("ours undivided", "ours over actors")
        }
        manifest = ours.divided.database.manifest
        benchmark.plots.mkdir(parents=True, exist_ok=True)
        if manifest.index_curve:
            plot = benchmark.plots / "retrieval-families.png"
            plot_curve(manifest.index_curve, manifest.index, benchmark.target_recall, plot)
            print(curve_table(manifest.index_curve, manifest.index))
        described = {"index": ours.describe(), "index_of_codes": codes.describe()}
        index_bytes, index_bytes_of_codes = (own.divided.index_bytes_per_chunk for own in (ours, codes))
    recall = {name: _recall(found[name], found["exact"]) for name in contenders}
    growth = [_measure_size(keys, held_out, queries, size, benchmark) for size in benchmark.sizes if size <= len(keys)]
    if growth:
        _plot_growth(growth, benchmark.plots / "retrieval-growth.png")
    p50 = {name: statistics.median(times) for name, times in single_ms.items()}
    return {
        "num_keys": len(keys),
        "num_queries": len(queries),
        "num_threads": num_threads,
        **described,
        "recall_at_10": recall["ours undivided"],
        "recall_at_10_sharded": recall["ours over actors"],
        "recall_at_10_codes": recall["codes undivided"],
        "recall_at_10_ivfpq": recall["ivfpq"],
        "qps_exact": qps["exact"],
        "qps_ivfpq": qps["ivfpq"],
        "qps_batch": qps["ours undivided"],
        "qps_batch_same_shards_in_process": qps["ours in shards"],
        "qps_batch_sharded": qps["ours over actors"],
        "qps_codes": qps["codes undivided"],
        "qps_codes_same_shards_in_process": qps["codes in shards"],
        "qps_codes_sharded": qps["codes over actors"],
        "speedup_over_ivfpq": qps["ours undivided"] / qps["ivfpq"],
        "speedup_over_ivfpq_of_codes": qps["codes undivided"] / qps["ivfpq"],
        # What dividing and actors cost together, and what actors cost.
        **{
            key: qps[f"{name} over actors"] / qps[f"{name} {whole}"]
            for name, suffix in (("ours", ""), ("codes", "_of_codes"))
            for key, whole in (
                (f"sharded_efficiency{suffix}", "undivided"),
                (f"actors_efficiency{suffix}", "in shards"),
            )
        },
        "codes_sharded_equals_whole": bool((found["codes over actors"] == found["codes undivided"]).all()),
        "sharded_equals_same_segments": bool((found["ours over actors"] == found["ours in shards"]).all()),
        "p50_ms_single": p50["ours undivided"],
        "p50_ms_single_sharded": p50["ours over actors"],
        "p99_ms_single_sharded": float(np.quantile(single_ms["ours over actors"], 0.99)),
        "added_ms_single": p50["ours over actors"] - p50["ours undivided"],
        "bytes_per_chunk": index_bytes,
        "bytes_per_chunk_of_codes": index_bytes_of_codes,
        "key_bytes_per_chunk_on_disk": 4 * keys.shape[1],
        "growth": growth,
    }


class _Searches:
    """A database in shards, and the same keys undivided, as they are searched until the stack is left."""

    def __init__(self, stack: ExitStack, divided: KeyDatabase) -> None:
        self.divided = stack.enter_context(divided)
        self._whole = stack.enter_context(divided.divided(1))
        connect()
        undivided, in_shards = (LocalRetriever.open(own.database) for own in (self._whole, divided))
        over_actors = ShardedRetriever(divided.database)
        stack.callback(stop_shard_actors, divided.database.directory)
        over_actors.wait_until_ready()
        self.by_name: dict[str, Search] = {
            "undivided": lambda some: undivided.search_ids(some, _K)[1],
            "in shards": lambda some: in_shards.search_ids(some, _K)[1],
            "over actors": lambda some: over_actors.search_ids(some, _K)[1],
        }

    def describe(self) -> str:
        """Its index."""
        spec, of_whole = (own.database.manifest.index for own in (self.divided, self._whole))
        if spec.is_graph:
            return f"{spec.factory}, ef {of_whole.nprobe} undivided, {spec.nprobe} in shards"
        return f"{spec.factory}, {spec.nprobe} lists, {spec.refine_factor:g} candidates per neighbour"


def _exact(keys: np.ndarray) -> Search:
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    return lambda some: index.search(some, _K)[1]


def _peer(keys: np.ndarray) -> Search:
    """What mengzi-retrieval-lm ships (trained on a random sample, where it takes the first rows)."""
    index = faiss.index_factory(keys.shape[1], _PEER_INDEX)
    sample = np.random.default_rng(0).choice(len(keys), min(len(keys), _PEER_TRAINING_KEYS), replace=False)
    index.train(keys[np.sort(sample)])
    index.add(keys)
    faiss.extract_index_ivf(index).nprobe = _PEER_NPROBE
    return lambda some: index.search(some, _K)[1]


def _in_turns(contenders: dict[str, Search], queries: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Median queries per second of each, in batches of all queries, and what each found."""
    found = {name: search(queries) for name, search in contenders.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_NUM_ROUNDS):
        for name, search in contenders.items():
            # Exact search is slow, and scales: a part of the queries tells.
            some = queries[: len(queries) // 8] if name == "exact" else queries
            start = time.perf_counter()
            search(some)
            seconds[name].append((time.perf_counter() - start) / len(some))
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}, found


def _single_query_ms(search: Search, queries: np.ndarray) -> list[float]:
    """Milliseconds of one query after the other, in this thread."""
    times = []
    for row in range(len(queries)):
        start = time.perf_counter()
        search(queries[row : row + 1])
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float((found[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def _measure_size(
    keys: np.ndarray, held_out: np.ndarray, queries: np.ndarray, size: int, benchmark: RetrievalBenchmark
) -> dict[str, Any]:
    """One database of `size` random keys, in process, with an index as it comes."""
    rows = np.sort(np.random.default_rng(size).choice(len(keys), size, replace=False))
    some = np.ascontiguousarray(keys[rows])
    with KeyDatabase.build(some, held_out, benchmark.target_recall, num_shards=1) as whole:
        local = LocalRetriever.open(whole.database)
        contenders: dict[str, Search] = {"exact": _exact(some), "ours": lambda q: local.search_ids(q, _K)[1]}
        qps, found = _in_turns(contenders, queries)
        single_ms = statistics.median(_single_query_ms(contenders["ours"], queries[:_NUM_SINGLE_QUERIES]))
        return {
            "num_keys": size,
            "index": whole.database.manifest.index.factory,
            "recall_at_10": _recall(found["ours"], found["exact"]),
            "us_per_query_batch": 1e6 / qps["ours"],
            "us_per_query_exact": 1e6 / qps["exact"],
            "p50_ms_single": single_ms,
            "bytes_per_chunk": whole.index_bytes_per_chunk,
        }


def _plot_growth(growth: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time_axis, memory_axis = figure.subplots(1, 2)
    sizes = [point["num_keys"] for point in growth]
    time_axis.plot(sizes, [point["us_per_query_exact"] for point in growth], "o-", label="exact search")
    time_axis.plot(sizes, [point["us_per_query_batch"] for point in growth], "o-", label="ours")
    time_axis.set(title="time per query, in batches", xlabel="keys", ylabel="microseconds", yscale="log")
    memory_axis.plot(sizes, [point["bytes_per_chunk"] for point in growth], "o-")
    memory_axis.set(title="index in memory", xlabel="keys", ylabel="bytes per chunk")
    memory_axis.set_ylim(bottom=0)
    for axis in (time_axis, memory_axis):
        axis.grid(alpha=0.3, which="both")
        axis.xaxis.set_major_formatter(lambda size, _: f"{size / 1000:,.0f}k")
    time_axis.legend()
    figure.savefig(path, dpi=120)


def main(benchmark: RetrievalBenchmark) -> None:
    """Measure and report."""
    metrics = measure(benchmark)
    for name, value in metrics.items():
        if name == "growth":
            continue
        print(f"{name:>28}  {value:,.5g}" if isinstance(value, float) else f"{name:>28}  {value}")
    for point in metrics["growth"]:
        print("  " + ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items()))
    if benchmark.json is not None:
        benchmark.json.parent.mkdir(parents=True, exist_ok=True)
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(RetrievalBenchmark, "python -m benchmarks.retrieval")
    run(lambda: main(parsed))
