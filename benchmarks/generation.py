"""How fast is generation: one stream and eight, beside others, with and without retrieval and drafts?

Everything is measured in one run and in turns, since machines change their speed: a model of the
paper's smallest size with random weights against a real database, and a model that was trained for
what depends on the text.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import run_with
from benchmarks.generation_homes import prompts, require_database, require_trained
from benchmarks.generation_int8 import int8_cost
from benchmarks.generation_prefetch import prefetch_cost
from benchmarks.generation_rates import (
    answer_alone,
    decode_streams,
    in_own_thread,
    llama_like,
    llama_tokens_per_s,
    num_decoder_weights,
    random_model,
    read_bandwidth,
    retro_pytorch_tokens_per_s,
)
from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.command_line import parse, run
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.fast_model import fast_model
from retro_ray.model.int8_product import int8_is_fast
from retro_ray.model.retro import RetroModel
from retro_ray.openmp import computing_alone
from retro_ray.recipes import paper_172m
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import ChunkRetriever
from retro_ray.training.checkpoint import load_model
from retro_ray.training.run_folder import run_directory

_TRAINED_PROMPT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark:
    """Tokens per second of one stream and eight, beside transformers and retro-pytorch; what retrieval costs and
    drafts gain.
    """

    home: Path | None = None
    """Folder of a database of at least 50,000 chunks. Default: one is built from python-docs in --cache."""
    trained_home: Path | None = None
    """Folder of a trained run and its database. Default: they are made from aws-cfn-2019 of --data in --cache."""
    run: str = "default"
    """Name of the trained run."""
    data: Path | None = None
    """Folder of corpora. Without it, and without --trained-home, what takes a trained model is not measured."""
    cache: Path = Path("results/homes")
    """Where what is built first is kept."""
    peers_python: Path = Path(".venv-peers/bin/python")
    """Interpreter of the environment that has retro-pytorch."""
    context: int = 512
    """Tokens of a stream, the generated ones included."""
    num_tokens: int = 128
    """Generated of each stream."""
    num_streams: int = 8
    long_prompt: int = 1024
    """Tokens of the prompt whose first token is waited for."""
    num_prompts: int = 12
    """That drafts are measured on."""
    num_rounds: int = 3
    """Of everything; medians are reported."""
    json: Path | None = None
    """Write the metrics to this file."""


def measure_speed(benchmark: GenerationBenchmark) -> dict[str, Any]:
    """What the paper's shape with random weights shows."""
    database = Database.open(require_database(benchmark.home, benchmark.cache.absolute()))
    retriever = ChunkRetriever.open(database, LocalRetriever.open(database))
    config = paper_172m(database.manifest.vocab_size, database.chunk_length).model
    model = random_model(config, database.tokenizer.eos_id)
    num_weights = num_decoder_weights(model)
    in_bf16 = fast_model(random_model(config, database.tokenizer.eos_id), int8=False)
    plain = GenerationEngine(in_bf16, database.tokenizer, retriever, speculate=0)
    fast = fast_model(model)
    engine = GenerationEngine(fast, database.tokenizer, retriever, speculate=0)
    prefetching = GenerationEngine(fast, database.tokenizer, retriever, speculate=0, prefetch=True)
    llama = llama_like(config)

    # Of different lengths, so that they do not end their chunks in the same step.
    longest = benchmark.context - benchmark.num_tokens
    step = max(1, config.chunk_length // benchmark.num_streams)
    store = max(database.segments, key=lambda segment: segment.num_chunks)
    texts = prompts(store, [longest - step * n for n in range(benchmark.num_streams)])
    [long_text] = prompts(store, [benchmark.long_prompt - 1])  # the start-of-document token comes in front

    samples: dict[str, list[float]] = {}
    same = True
    for _ in range(benchmark.num_rounds):
        one, eight, one_off, eight_off = (
            decode_streams(engine, chosen, benchmark.num_tokens, retrieval)
            for retrieval in (True, False)
            for chosen in (texts[:1], texts)
        )
        one_bf16, eight_bf16 = (
            decode_streams(plain, chosen, benchmark.num_tokens, retrieval=True) for chosen in (texts[:1], texts)
        )
        ahead = decode_streams(prefetching, texts[:1], benchmark.num_tokens, retrieval=True)
        same = same and one.answers.results[0].token_ids == eight.answers.results[0].token_ids
        figures = {
            "tokens_per_s_1": one.tokens_per_s,
            "tokens_per_s_8": eight.tokens_per_s,
            "tokens_per_s_1_prefetch": ahead.tokens_per_s,
            "tokens_per_s_1_off": one_off.tokens_per_s,
            "tokens_per_s_8_off": eight_off.tokens_per_s,
            "tokens_per_s_1_bf16": one_bf16.tokens_per_s,
            "tokens_per_s_8_bf16": eight_bf16.tokens_per_s,
            "retrieval_hidden_share_8": eight.answers.retrieval_hidden_share,
            "hf_tokens_per_s": in_own_thread(partial(llama_tokens_per_s, llama, texts[:1], benchmark.num_tokens)),
            "read_gb_per_s": in_own_thread(read_bandwidth) / 1e9,
            "time_to_first_token_s": answer_alone(engine, long_text, 1).seconds,
        }
        for name, value in figures.items():
            samples.setdefault(name, []).append(value)
    metrics: dict[str, Any] = {name: statistics.median(values) for name, values in samples.items()}
    weight_bytes = num_weights * (1 if int8_is_fast() else 2)
    peers = retro_pytorch_tokens_per_s(benchmark.peers_python, config, benchmark.context, num_tokens=4)
    return {
        **metrics,
        # As it comes, which is float32; and under autocast, which it leaves to its user.
        "retro_pytorch_tokens_per_s": peers["fp32"],
        "retro_pytorch_tokens_per_s_bf16": peers["bf16"],
        "ratio_vs_retro_pytorch": metrics["tokens_per_s_1"] / peers["fp32"],
        "ratio_vs_retro_pytorch_bf16": metrics["tokens_per_s_1"] / peers["bf16"],
        "ratio_vs_hf": metrics["tokens_per_s_1"] / metrics["hf_tokens_per_s"],
        "ratio_vs_hf_off": metrics["tokens_per_s_1_off"] / metrics["hf_tokens_per_s"],
        "batching_gain": metrics["tokens_per_s_8"] / metrics["tokens_per_s_1"],
        "retrieval_cost": metrics["tokens_per_s_1_off"] / metrics["tokens_per_s_1"],
        "retrieval_cost_8": metrics["tokens_per_s_8_off"] / metrics["tokens_per_s_8"],
        "int8_gain": metrics["tokens_per_s_1"] / metrics["tokens_per_s_1_bf16"],
        "int8_gain_8": metrics["tokens_per_s_8"] / metrics["tokens_per_s_8_bf16"],
        "bandwidth_fraction": weight_bytes * metrics["tokens_per_s_1"] / (metrics["read_gb_per_s"] * 1e9),
        "same_alone_as_in_batch": same,
        "decoder_mb": weight_bytes / 1e6,
        "hf_decoder_mb": 2e-6 * llama.num_parameters(),
        "database_chunks": database.manifest.num_chunks,
    }


def measure_trained(benchmark: GenerationBenchmark) -> dict[str, Any]:
    """What drafts save, and what prefetching and weights of eight bits cost, with a trained model on held-out
    documents; nothing without one.
    """
    home = require_trained(benchmark.trained_home, benchmark.run, benchmark.data, benchmark.cache.absolute())
    if home is None:
        print("no --data and no --trained-home: what takes a trained model is not measured", file=sys.stderr)
        return {}
    database = Database.open(home)
    if database.validation is None:
        raise DatabaseError(f"the database in {home} has no validation split: drafts are measured on its documents")

    def load() -> RetroModel:
        return load_model(run_directory(home, benchmark.run), database.manifest)[0]

    model = fast_model(load())
    retriever = ChunkRetriever.open(database, LocalRetriever.open(database))
    plain = GenerationEngine(model, database.tokenizer, retriever, speculate=0)
    drafting = GenerationEngine(model, database.tokenizer, retriever)
    num_tokens = min(256, model.config.context_length - _TRAINED_PROMPT_TOKENS - 2)
    seconds = {"plain": 0.0, "drafting": 0.0}
    num_generated = num_passes = num_same = 0
    texts = prompts(database.validation, [_TRAINED_PROMPT_TOKENS] * benchmark.num_prompts)
    for text in texts:
        expected, drafted = answer_alone(plain, text, num_tokens), answer_alone(drafting, text, num_tokens)
        seconds["plain"] += expected.seconds
        seconds["drafting"] += drafted.seconds
        num_generated += len(drafted.results[0].token_ids) - 1  # the first is read off the prompt
        num_passes += drafted.ended.num_steps
        num_same += drafted.results[0].token_ids == expected.results[0].token_ids
    return {
        "speculation_gain": seconds["plain"] / seconds["drafting"],
        "speculation_tokens_per_s": num_generated / seconds["drafting"],
        "accepted_tokens_per_pass": (num_generated - num_passes) / num_passes,
        "speculation_same_answers": num_same / len(texts),
        **in_own_thread(partial(int8_cost, load, database, database.validation)),
        **in_own_thread(partial(prefetch_cost, load(), database, database.validation, retriever)),
    }


def report(metrics: dict[str, Any]) -> str:
    """A table for people."""
    return "\n".join(
        f"{name:>28}  {value}" if isinstance(value, bool) else f"{name:>28}  {value:,.4g}"
        for name, value in metrics.items()
    )


def main(benchmark: GenerationBenchmark) -> None:
    """Measure and report."""
    torch.set_num_threads(os.cpu_count() or 1)
    with computing_alone():
        metrics = measure_speed(benchmark) | measure_trained(benchmark)
    print(report(metrics))
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(GenerationBenchmark, "python -m benchmarks.generation")
    run_with(FAST_ALLOCATOR_ENV, "benchmarks.generation")
    run(lambda: main(parsed))
