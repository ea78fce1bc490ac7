"""How fast are documents scored with retrieval, beside training the same model?

One process, as a worker of jobs/evaluate.py and one of jobs/train.py compute: training steps and the scoring of
held-out documents in turns, on the same database. Weights are random: no time depends on them. Training leaves the
neighbours of some windows out (retrieval dropout, here as in the middle of a run), scoring those of none; so training
with all of them is measured, too. A document longer than a window is read in windows that overlap by half: tokens are
scored once, but some of them read twice.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.command_line import parse, run
from retro_ray.config import default_home
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.evaluation.bits_per_byte import (
    RetrievalMode,
    choose_documents,
    document_groups,
    num_tokens_read,
    score_pass,
)
from retro_ray.model.retro import RetroModel
from retro_ray.recipes import get_recipe
from retro_ray.training.batches import TrainingBatches
from retro_ray.training.step import TrainingStep
from retro_ray.training.windows import ChunkTable, WindowReader, stored_neighbours


@dataclass(frozen=True, kw_only=True)
class EvaluationBenchmark:
    """Tokens per second of scoring and of training."""

    home: Path = field(default_factory=default_home)
    """Of a database with a validation split, as jobs/index.py makes it. $RETRO_RAY_HOME, or ~/.retro_ray."""
    recipe: str = "tiny"
    """Whose model."""
    num_rounds: int = 5
    """In each, some training steps are taken and about 512 chunks scored; the fastest counts."""
    num_threads: int = os.cpu_count() or 1
    """Of torch."""
    json: Path | None = None
    """Write the metrics to this file."""


def training(model: RetroModel, database: Database, benchmark: EvaluationBenchmark) -> Callable[[float], int]:
    """Takes training steps with a share of the windows left without neighbours; returns their tokens."""
    config = get_recipe(benchmark.recipe)(database.manifest.vocab_size).training
    table = ChunkTable(database.segments, database.deleted)
    reader = WindowReader(
        table,
        database,
        neighbours=stored_neighbours(table, database, model.config.num_neighbours),
        end_target=database.tokenizer.eos_id,
    )
    step, numbers = TrainingStep(model, config, torch.device("cpu")), iter(range(1 << 30))

    def train(dropout: float) -> int:
        batches = TrainingBatches(
            reader,
            num_chunks=model.config.num_chunks,
            batch_size=config.batch_size,
            seed=0,
            retrieval_dropout=dropout,
        )
        shares = [batches.at(next(numbers)) for _ in range(8)]
        for share in shares:
            step.run(share)
        return sum(share.num_targets for share in shares)

    return train


def scoring(model: RetroModel, database: Database) -> Callable[[RetrievalMode], tuple[int, int]]:
    """Scores group after group of held-out documents; returns tokens read, and tokens scored."""
    store = database.validation
    if store is None or store.num_documents == 0:
        raise ConfigError(f"the database in {database.directory} has no validation split: name another --home")
    groups = document_groups(choose_documents(store, store.num_chunks), store.document_num_chunks)
    found = _cycle(groups)

    def score(mode: RetrievalMode) -> tuple[int, int]:
        documents = next(found)
        num_scored = score_pass(model, store, database, documents, mode=mode).total.num_tokens
        return num_tokens_read(store, documents, model.config.num_chunks), num_scored

    return score


def _cycle(groups: list[np.ndarray]) -> Iterator[np.ndarray]:
    while True:
        yield from groups


def measure(benchmark: EvaluationBenchmark) -> dict[str, float]:
    """The metrics."""
    database = Database.open(benchmark.home)
    recipe = get_recipe(benchmark.recipe)(database.manifest.vocab_size)
    torch.manual_seed(0)
    model = RetroModel(recipe.model)
    train, score = training(model, database, benchmark), scoring(model, database)
    dropout = recipe.training.retrieval_dropout_at(recipe.training.num_steps // 2)
    works: dict[str, Callable[[], tuple[int, ...]]] = {
        "training": lambda: (train(dropout),),
        "training_all_with_neighbours": lambda: (train(0.0),),
        "scoring_on": lambda: score("on"),
        "scoring_off": lambda: score("off"),
    }
    rates = {name: [0.0] for name in works}
    for number in range(benchmark.num_rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            tokens = work()
            seconds = time.perf_counter() - start
            if number:  # the first of each meets memory and kernels that are not there yet
                rates[name] = max(rates[name], [count / seconds for count in tokens])
    read = rates["scoring_on"][0]
    return {
        **{f"tokens_per_s_{name}": rate[0] for name, rate in rates.items()},
        "tokens_scored_per_s_on": rates["scoring_on"][1],
        "tokens_scored_per_s_off": rates["scoring_off"][1],
        "retrieval_dropout": dropout,
        "ratio_to_training": read / rates["training"][0],
        "ratio_to_training_all_with_neighbours": read / rates["training_all_with_neighbours"][0],
        "ratio_of_scored_to_training": rates["scoring_on"][1] / rates["training"][0],
    }


def main(benchmark: EvaluationBenchmark) -> None:
    """Measure and report."""
    torch.set_num_threads(benchmark.num_threads)
    metrics = measure(benchmark)
    for name, value in metrics.items():
        print(f"{name:>44}  {value:,.4g}")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if not FAST_ALLOCATOR_ENV.items() <= os.environ.items():  # as the workers of both jobs are started
        command = [sys.executable, "-m", "benchmarks.evaluation", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **FAST_ALLOCATOR_ENV})
    parsed = parse(EvaluationBenchmark, "python -m benchmarks.evaluation")
    run(lambda: main(parsed))
