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

from retro_ray.command_line import parse, run
from retro_ray.config import CcaStart, Compile, OptimizerName, Parallel, Precision, default_home
from retro_ray.errors import ConfigError

# Flags that replace a recipe's settings, and the fields they stand for.
_MODEL_FIELDS = ("num_chunks", "num_neighbours", "cca_start", "pointer")
_TRAINING_FIELDS = (
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "optimizer",
    "parallel",
    "precision",
    "retrieval_dropout",
    "final_retrieval_dropout",
    "compile",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a RETRO model on a home's retrieval database.

    Settings left out are the recipe's; with --resume, the run's.
    """

    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    recipe: str | None = None
    """tiny (the default), small, paper-172m, paper-425m, paper-1.5b or paper-7.5b."""
    retrofit: str | None = None
    """In place of a recipe: a pretrained model that learns to read neighbours, and without them stays what
    it is. Folder or name of a Hugging Face model (Llama, Mistral, Qwen2, Qwen3) whose tokenizer the
    database has, or folder of a run."""
    unfreeze: bool = False
    """With --retrofit: train the pretrained weights too."""
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
    optimizer: OptimizerName | None = None
    """muon: Muon for the matrices inside the blocks, AdamW for all else."""
    parallel: Parallel | None = None
    """Each worker has the whole model (ddp), or a part of it (fsdp)."""
    precision: Precision | None = None
    """Of products: int8 is for wide layers in training on a CPU, beside bf16; auto: what is fastest here."""
    num_chunks: int | None = None
    """Chunks per sequence."""
    num_neighbours: int | None = None
    """Neighbours per chunk (k), at most what the database stores."""
    cca_start: CcaStart | None = None
    """Start of chunked cross-attention: the paper's, or one that copies."""
    pointer: bool | None = None
    """What a position points at among its neighbours' tokens is a part of the output, beside the softmax."""
    retrieval_dropout: float | None = None
    """Share of sequences that see no neighbours."""
    final_retrieval_dropout: float | None = None
    """The share at the last step, up to which it changes evenly."""
    compile: Compile | None = None
    """Compile the model's blocks for faster steps; auto: on a GPU."""
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


def main(flags: TrainFlags) -> None:
    """Train, then say what came of it."""
    from retro_ray.training.launch import launch

    def say(line: str) -> None:
        print(line, file=sys.stderr if flags.json else sys.stdout, flush=True)

    training = {name: value for name in _TRAINING_FIELDS if (value := getattr(flags, name)) is not None}
    if flags.steps is not None:
        training["num_steps"] = flags.steps
    if flags.unfreeze:
        if flags.retrofit is None:
            raise ConfigError("--unfreeze is for --retrofit: name what is to be fitted, or leave --unfreeze out")
        training["trained"] = "all"
    result = launch(
        flags.home.expanduser().absolute(),
        run=flags.run,
        recipe=flags.recipe,
        retrofit=flags.retrofit,
        resume=flags.resume,
        num_workers=flags.num_workers,
        use_gpu=flags.use_gpu,
        model={name: value for name in _MODEL_FIELDS if (value := getattr(flags, name)) is not None},
        training=training,
        say=say,
    )
    if flags.json:
        print(json.dumps(result))


if __name__ == "__main__":
    parsed = parse(TrainFlags, "jobs/train.py")
    run(lambda: main(parsed))
