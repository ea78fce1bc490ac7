"""How fast does a GPU generate: some streams at once, beside transformers, and what recorded passes gain?

A model of the paper's smallest size with random weights. Neighbours are chunks of a database drawn by chance, so that
what is measured is the GPU: what a search takes, benchmarks/generation.py says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.generation_homes import prompts
from benchmarks.generation_rates import (
    answer_alone,
    decode_streams,
    llama_like,
    llama_tokens_per_s,
    num_decoder_weights,
    random_model,
)
from retro_ray.command_line import parse, run
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.fast_model import fast_model
from retro_ray.model.cache import DecodeCache
from retro_ray.recipes import paper_172m
from retro_ray.retrieval.lookup import look_up
from retro_ray.retrieval.retriever import NeighbourSet


@dataclass(frozen=True, kw_only=True)
class GpuGenerationBenchmark:
    """Tokens per second of one stream and of several on a GPU."""

    home: Path
    """Folder of a database."""
    streams: tuple[int, ...] = (1, 8, 32)
    """Streams at once."""
    context: int = 512
    """Tokens of a stream, the generated ones included."""
    num_tokens: int = 128
    """Generated of each stream."""
    long_prompt: int = 1024
    """Tokens of the prompt whose first token is waited for."""
    device: str = "cuda"
    """What generates."""
    json: Path | None = None
    """Write the metrics to this file."""


class DealtNeighbours:
    """Finds chunks by chance, the same ones for the same chunk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int) -> NeighbourSet:
        """`k` chunks for each."""
        drawn = [
            np.random.default_rng(list(chunk)).integers(self._database.manifest.num_chunks, size=k) for chunk in chunks
        ]
        return look_up(self._database, np.zeros((len(chunks), k), np.float32), np.array(drawn))


@contextlib.contextmanager
def asked_for_one_by_one() -> Iterator[None]:
    """Passes are not recorded meanwhile."""
    with mock.patch.object(DecodeCache, "records_passes", False):
        yield


def measure(benchmark: GpuGenerationBenchmark) -> dict[str, Any]:
    """All metrics."""
    if benchmark.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and torch finds no GPU: name --device cpu, or use benchmarks.generation")
    database = Database.open(benchmark.home)
    config = paper_172m(database.manifest.vocab_size, database.chunk_length).model
    model = random_model(config, database.tokenizer.eos_id).to(benchmark.device)
    weight_bytes = 2 * num_decoder_weights(model)
    engine = GenerationEngine(fast_model(model), database.tokenizer, DealtNeighbours(database), speculate=0)
    llama = llama_like(config)
    llama.to(torch.device(benchmark.device))  # pyright: ignore
    longest, store = benchmark.context - benchmark.num_tokens, max(database.segments, key=lambda part: part.num_chunks)
    metrics: dict[str, Any] = {}
    for num_streams in benchmark.streams:
        # Of different lengths, so that they do not end their chunks in the same step.
        step = max(1, config.chunk_length // num_streams)
        texts = prompts(store, [longest - step * n for n in range(num_streams)])
        on, off = (decode_streams(engine, texts, benchmark.num_tokens, retrieval) for retrieval in (True, False))
        with asked_for_one_by_one():
            plain = decode_streams(engine, texts, benchmark.num_tokens, True)
        same = [a.token_ids == b.token_ids for a, b in zip(on.answers.results, plain.answers.results, strict=True)]
        found = {
            f"tokens_per_s_{num_streams}": on.tokens_per_s,
            f"tokens_per_s_{num_streams}_off": off.tokens_per_s,
            f"tokens_per_s_{num_streams}_not_recorded": plain.tokens_per_s,
            f"hf_tokens_per_s_{num_streams}": llama_tokens_per_s(llama, [texts[0]] * num_streams, benchmark.num_tokens),
            f"same_share_{num_streams}": float(np.mean(same)),
        }
        print(report(found), flush=True)
        metrics |= found
    [long_text] = prompts(store, [benchmark.long_prompt - 1])
    answer_alone(engine, long_text, 1)
    return {
        **metrics,
        "weights_gb_per_s_1": weight_bytes * metrics["tokens_per_s_1"] / 1e9 if 1 in benchmark.streams else None,
        "time_to_first_token_s": answer_alone(engine, long_text, 1).seconds,
    }


def report(metrics: dict[str, Any]) -> str:
    """A table for people."""
    return "\n".join(f"{name:>36}  {value:,.4g}" for name, value in metrics.items() if value is not None)


def main(benchmark: GpuGenerationBenchmark) -> None:
    """Measure and report."""
    metrics = measure(benchmark)
    print(report(metrics))
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(GpuGenerationBenchmark, "python -m benchmarks.generation_gpu")
    run(lambda: main(parsed))
