#!/usr/bin/env python3
"""Train a RETRO model on a retrieval database: `ray job submit jobs/train.py`, or as a program.

Writes HOME/runs/NAME: checkpoints, metrics.jsonl, loss.png. `--resume` continues a run that was
killed, with the same batches and losses as if nothing had happened.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from retro_ray.config import RunConfig, default_home
from retro_ray.database.store import Database
from retro_ray.errors import RetroRayError
from retro_ray.ray_session import connect, num_cluster_gpus
from retro_ray.training.checkpoint import find_checkpoint
from retro_ray.training.loop import choose_workers, fit
from retro_ray.training.run_folder import (
    locked,
    move_aside,
    new_config,
    resumed_config,
    run_directory,
    write_config,
)
from retro_ray.training.trainer import TrainingJob, TrainingOutcome

# Flags that replace a recipe's settings, and the fields they stand for.
_MODEL_FIELDS = ("num_neighbours", "cca_start")
_TRAINING_FIELDS = (
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "optimizer",
    "precision",
    "retrieval_dropout",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Settings left out are the recipe's; with --resume, the run's."""

    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    recipe: str | None = None
    """tiny (the default), small, paper-172m, paper-425m, paper-1.5b or paper-7.5b."""
    run: str = "default"
    """Name of the run; an older one of that name is kept as NAME-1, NAME-2, ..."""
    resume: bool = False
    """Continue the run from its newest checkpoint; start it, if there is none."""
    steps: int | None = None
    """Optimiser steps; the warm-up is at most a tenth of them."""
    num_workers: int | None = None
    """Data-parallel workers. Default: one per GPU, else one per free CPU up to 8."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """One GPU per worker; auto: if the cluster has any."""
    batch_size: int | None = None
    """Sequences per optimiser step, over all workers."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of one worker."""
    learning_rate: float | None = None
    """Highest learning rate."""
    optimizer: Literal["adamw", "muon"] | None = None
    """muon: Muon for the matrices inside the blocks, AdamW for all else."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """auto: bf16 where the hardware multiplies it, else fp32."""
    num_neighbours: int | None = None
    """Neighbours per chunk (k), at most what the database stores."""
    cca_start: Literal["paper", "copy"] | None = None
    """Start of chunked cross-attention: the paper's, or one that copies."""
    retrieval_dropout: float | None = None
    """Share of sequences that see no neighbours."""
    gradient_checkpointing: bool | None = None
    """Less memory, about a third more time."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    keep_checkpoints: int | None = None
    """Newest checkpoints kept."""
    evaluate_every: int | None = None
    """Steps between validations."""
    seed: int | None = None
    """Of initialisation, data order and retrieval dropout."""
    json: bool = False
    """Print the outcome as one JSON object on standard output, and progress on standard error."""


def train(flags: TrainFlags) -> dict[str, object]:
    """Run the job; returns what --json prints."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if flags.json else sys.stdout, flush=True)

    home = flags.home.expanduser().absolute()
    directory = run_directory(home, flags.run)
    database = Database.open(home)
    with locked(directory):
        resuming = flags.resume and directory.exists()
        if flags.resume and not resuming:
            say(f"nothing to resume: {directory} is started anew")
        config = _config(flags, database, directory, resuming)
        connect()
        use_gpu = num_cluster_gpus() > 0 if flags.use_gpu == "auto" else flags.use_gpu == "yes"
        num_workers = choose_workers(flags.num_workers, use_gpu, config.training.batch_size)
        if not resuming:
            move_aside(directory, say)
        write_config(directory, config, database.manifest.version)
        job = TrainingJob(home=home, run_directory=directory, config=config)
        outcome = fit(job, num_workers=num_workers, use_gpu=use_gpu, say=say)
    say(_summary(outcome, directory))
    return {
        "run": str(directory),
        "checkpoint": str(find_checkpoint(directory)[0]),
        "steps": outcome.steps,
        "validation_bpb_on": outcome.validation.get("on"),
        "validation_bpb_off": outcome.validation.get("off"),
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "num_workers": num_workers,
    }


def _config(flags: TrainFlags, database: Database, directory: Path, resuming: bool) -> RunConfig:
    model = {name: value for name in _MODEL_FIELDS if (value := getattr(flags, name)) is not None}
    training = {name: value for name in _TRAINING_FIELDS if (value := getattr(flags, name)) is not None}
    if flags.steps is not None:
        training["num_steps"] = flags.steps
    if resuming:
        return resumed_config(directory, flags.recipe, model, training)
    return new_config(flags.recipe or "tiny", database.manifest, model, training)


def _summary(outcome: TrainingOutcome, directory: Path) -> str:
    figures = ", ".join(f"{value:.4f} with retrieval {mode}" for mode, value in outcome.validation.items())
    quality = f"; validation bits per byte {figures}" if figures else "; no validation documents"
    return f"trained {outcome.steps} steps{quality}; in {directory}"


def main() -> int:
    """The command line; returns the exit status."""
    flags = tyro.cli(TrainFlags, prog="train.py", description=__doc__)
    try:
        result = train(flags)
    except RetroRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if flags.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
