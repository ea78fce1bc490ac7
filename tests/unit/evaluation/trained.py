"""A run with one checkpoint, of a model that nobody trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from retro_ray.database.store import Database
from retro_ray.training.checkpoint import CheckpointMeta, save_checkpoint
from retro_ray.training.optimizer import Optimizer
from tests.fakes import tiny_run_config
from tests.unit.model.models import random_model


def save_run(
    home: Path,
    database: Database,
    *,
    run: str = "default",
    seed: int = 0,
    uniform: bool = False,
    meta: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Write a checkpoint of a random model; a uniform one finds all tokens equally likely. Returns its folder."""
    config = tiny_run_config(database)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    torch.manual_seed(seed)
    trained = random_model(config.model, dtype=torch.float32)
    if uniform:
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.zero_()
    manifest = database.manifest
    recorded = {
        "step": 1,
        "config": config,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "chunking_fingerprint": manifest.chunking_fingerprint,
        "database_version": manifest.version,
        **(meta or {}),
    }
    optimizer = Optimizer(trained, config.training)
    return save_checkpoint(home / "runs" / run, CheckpointMeta(**recorded), trained, optimizer, keep=1)
