"""How much of the embedder's speed does the whole index job keep, and does its memory stay bounded?

The job runs as a user would run it, in a process of its own with a Ray of its own, on two sizes of
one corpus. Its memory is the proportional set size of it and all processes it started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.chunks import read_documents, sample_chunks
from benchmarks.embedders import EmbedderPool
from retro_ray.command_line import parse, run
from retro_ray.ray_session import connect

_SAMPLE_INTERVAL_S = 3.0


@dataclass(frozen=True, kw_only=True)
class IndexingBenchmark:
    """Tokens per second of the whole index job over those of the embedder alone; peak memory at two sizes."""

    input: tuple[str, ...] = ("python-docs",)
    """Corpus to index: once a quarter of its documents, once all."""
    num_embedded_chunks: int = 8192
    """Chunks the embedder alone is measured on, before and after the job."""
    json: Path | None = None
    """Write the metrics to this file."""


class PeakMemory:
    """Watches the proportional set size of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process(pid)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop watching; the peak, in bytes."""
        self._stopping.set()
        self._thread.join()
        return self.peak_bytes

    def _watch(self) -> None:
        while not self._stopping.wait(_SAMPLE_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        total = 0
        try:
            processes = [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in processes:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between the listing and here
        return total


def index_once(documents: Path, home: Path) -> dict[str, Any]:
    """Run the index job on a file; what it reports, with its wall time and peak memory."""
    command = [sys.executable, "jobs/index.py", "--input", str(documents), "--home", str(home), "--json"]
    start = time.perf_counter()
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        memory = PeakMemory(process.pid)
        output, _ = process.communicate()
        peak = memory.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {**json.loads(output), "wall_s": time.perf_counter() - start, "peak_bytes": peak}


def measure(benchmark: IndexingBenchmark) -> dict[str, Any]:
    """The metrics."""
    sample = sample_chunks(benchmark.input, benchmark.num_embedded_chunks)
    before = _embedder_chunks_per_s(sample.texts)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        documents = list(read_documents(benchmark.input))
        for name, every in (("quarter", 4), ("whole", 1)):
            path = Path(folder) / f"{name}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for document in documents[::every]:
                    file.write(json.dumps({"id": document.id, "title": document.title, "text": document.text}) + "\n")
            results[name] = index_once(path, Path(folder) / name)
    after = _embedder_chunks_per_s(sample.texts)
    tokens_per_chunk = sample.num_tokens / len(sample.texts)
    embedder_tokens_per_s = (before + after) / 2 * tokens_per_chunk
    whole, quarter = results["whole"], results["quarter"]
    num_tokens = (whole["chunks"] + whole["validation_chunks"]) * tokens_per_chunk
    return {
        "embedder_tokens_per_s": embedder_tokens_per_s,
        "job_tokens_per_s": num_tokens / whole["wall_s"],
        "pipeline_efficiency": num_tokens / whole["wall_s"] / embedder_tokens_per_s,
        "job_s": whole["wall_s"],
        "stage_seconds": whole["stage_seconds"],
        "chunks": whole["chunks"] + whole["validation_chunks"],
        "peak_gib": whole["peak_bytes"] / 2**30,
        "quarter_chunks": quarter["chunks"] + quarter["validation_chunks"],
        "quarter_peak_gib": quarter["peak_bytes"] / 2**30,
        "memory_growth": whole["peak_bytes"] / quarter["peak_bytes"],
    }


def _embedder_chunks_per_s(texts: list[str]) -> float:
    connect()
    pool = EmbedderPool()
    rate = pool.chunks_per_s(texts)
    pool.close()
    ray.shutdown()
    return rate


def main(benchmark: IndexingBenchmark) -> None:
    """Measure and report."""
    metrics = measure(benchmark)
    for name, value in metrics.items():
        print(f"{name:>22}  {value:,.5g}" if not isinstance(value, dict) else f"{name:>22}  {value}")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(IndexingBenchmark, "python -m benchmarks.indexing")
    run(lambda: main(parsed))
