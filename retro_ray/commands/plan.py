"""`python -m retro_ray plan`: what training would take, before anything is started."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_ray.config import OptimizerName, RunConfig
from retro_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_PAPER_VOCAB_SIZE = 128_000
_TRAINING_FIELDS = ("batch_size", "micro_batch_size", "gradient_checkpointing", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tell parameters, memory of each worker and days of a training run.

    By arithmetic, and from a rate that is given or measured on this machine by a few training steps.
    """

    recipe: str = "paper-7.5b"
    """tiny, small, paper-172m, paper-425m, paper-1.5b or paper-7.5b."""
    num_workers: int = 1
    """Data-parallel workers, of one GPU each, or processes on CPUs."""
    home: Path | None = None
    """Plan for the database of this folder: its vocabulary and chunks. Default: the paper's, 128,000 tokens and 64."""
    steps: int | None = None
    """Optimiser steps. Default: the recipe's."""
    batch_size: int | None = None
    """Sequences per optimiser step, over all workers."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of one worker."""
    gradient_checkpointing: bool | None = None
    """Less memory, about a third more time."""
    optimizer: OptimizerName | None = None
    """muon: Muon for the matrices inside the blocks, AdamW for all else."""
    measured_flops: float | None = None
    """FLOP/s that one worker reaches in training (an H200 reached 3.8e14 with paper-172m, 4.5e14 with
    paper-425m; jobs/train.py says the share of peak). Default: measured here; on a GPU that takes a minute."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"--num-workers is {self.num_workers}; it must be at least 1")
        if self.measured_flops is not None and self.measured_flops <= 0:
            raise ConfigError(f"--measured-flops is {self.measured_flops}; it must be above 0")
        rate, source = (self.measured_flops, "given") if self.measured_flops else _measure()
        result = {**plan(self._config(), self.num_workers, rate), "rate": source}
        print(json.dumps(result, indent=2) if self.json else _table(result))

    def _config(self) -> RunConfig:
        from retro_ray.recipes import get_recipe
        from retro_ray.training.run_folder import replaced

        vocab_size, chunk_length = _PAPER_VOCAB_SIZE, 64
        if self.home is not None:
            from retro_ray.database.format import database_directory, read_manifest

            manifest = read_manifest(database_directory(self.home.expanduser().absolute()))
            vocab_size, chunk_length = manifest.vocab_size, manifest.chunk_length
        training = {name: value for name in _TRAINING_FIELDS if (value := getattr(self, name)) is not None}
        if self.steps is not None:
            training["num_steps"] = self.steps
        config = replaced(get_recipe(self.recipe)(vocab_size, chunk_length), training)
        if self.num_workers > config.training.batch_size:
            raise ConfigError(
                f"--num-workers is {self.num_workers}, more than --batch-size {config.training.batch_size}: lower it "
                "or raise that"
            )
        return config


def plan(config: RunConfig, num_workers: int, flops_per_worker: float) -> dict[str, Any]:
    """What `--json` prints; memory in bytes."""
    from retro_ray.training.flops import training_flops_per_token
    from retro_ray.training.plan import count_parameters, duration, memory_per_worker

    counts, time = count_parameters(config.model), duration(config, num_workers, flops_per_worker)
    memory = {kind: memory_per_worker(config, num_workers, kind) for kind in ("ddp", "fsdp")}
    return {
        "recipe": config.recipe,
        "num_workers": num_workers,
        "vocab_size": config.model.vocab_size,
        "parameters": {
            "decoder": counts.decoder,
            "cross_attention": counts.cross_attention,
            "encoder": counts.encoder,
            "embeddings": counts.embeddings,
            "total": counts.total,
        },
        "memory_per_worker": {
            kind: {**dataclasses.asdict(of_kind), "total": of_kind.total} for kind, of_kind in memory.items()
        },
        "micro_batch_size": config.training.micro_batch_size,
        "gradient_checkpointing": config.training.gradient_checkpointing,
        "flops_per_token": training_flops_per_token(config.model),
        "flops_per_worker": flops_per_worker,
        "tokens": time.tokens,
        "tokens_per_second": time.tokens_per_second,
        "days": time.days,
    }


def _measure() -> tuple[float, str]:
    import torch

    from retro_ray.training.measure import measure_flops, measured_recipe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = measured_recipe(device)
    logger.info("measuring training steps of %s on this machine's %s", recipe, device.type)
    return measure_flops(device), f"measured on this machine's {device.type} with {recipe}"


def _table(result: dict[str, Any]) -> str:
    parameters, memory = result["parameters"], result["memory_per_worker"]
    lines = [f"{result['recipe']}, {result['num_workers']} workers, vocabulary of {result['vocab_size']:,}", ""]
    lines += [f"{'parameters':<18}{'million':>12}"]
    lines += [f"{name.replace('_', ' '):<18}{count / 1e6:>12,.1f}" for name, count in parameters.items()]
    lines += ["", f"{'memory/worker, GB':<18}{'ddp':>12}{'fsdp':>12}"]
    lines += [
        f"{part:<18}" + "".join(f"{memory[kind][part] / 1e9:>12,.2f}" for kind in memory) for part in memory["ddp"]
    ]
    checkpointing = "" if result["gradient_checkpointing"] else "; --gradient-checkpointing keeps fewer activations"
    lines += [f"(micro-batches of {result['micro_batch_size']}{checkpointing})", ""]
    lines += [
        f"{result['tokens'] / 1e9:,.3f} G tokens of {result['flops_per_token'] / 1e9:,.3f} GFLOP at "
        f"{result['flops_per_worker'] / 1e12:,.2f} TFLOP/s per worker ({result['rate']}):",
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['days']:,.2f} days",
    ]
    return "\n".join(lines)
