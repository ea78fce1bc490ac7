"""The rate at which this machine trains, by a few real steps."""

from __future__ import annotations

import dataclasses
import time

import torch

from retro_ray.config import ModelConfig, TrainingConfig
from retro_ray.model.retro import RetroModel
from retro_ray.recipes import get_recipe
from retro_ray.training.batches import StepBatch
from retro_ray.training.flops import training_flops_per_token
from retro_ray.training.step import TrainingStep
from retro_ray.training.windows import Batch

_VOCAB_SIZE = 32_000
_NUM_STEPS = 2


def measured_recipe(device: torch.device) -> str:
    """Large enough to tell what a device can do, small enough for one worker."""
    return "paper-425m" if device.type == "cuda" else "small"


def measure_flops(device: torch.device) -> float:
    """FLOP/s that training of `measured_recipe` reaches on `device`, by one process: the better of two steps."""
    recipe = get_recipe(measured_recipe(device))(_VOCAB_SIZE)
    training = dataclasses.replace(recipe.training, batch_size=4, micro_batch_size=4)
    return training_rate(recipe.model, training, device)


def training_rate(model: ModelConfig, training: TrainingConfig, device: torch.device) -> float:
    """FLOP/s of training steps on random tokens."""
    step = TrainingStep(RetroModel(model).to(device), training, device)
    share = _random_batch(model, training.batch_size)
    step.run(share)
    best_s = float("inf")
    for _ in range(_NUM_STEPS):
        start = time.perf_counter()
        float(step.run(share).loss)  # waits for the device
        best_s = min(best_s, time.perf_counter() - start)
    return training_flops_per_token(model) * share.batch.tokens_BT.numel() / best_s


def _random_batch(model: ModelConfig, batch_size: int) -> StepBatch:
    tokens = torch.randint(model.vocab_size, (batch_size, model.context_length + 1))
    of_neighbours = (batch_size, model.num_chunks, model.num_neighbours, model.neighbour_length)
    batch = Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        segments_BT=torch.zeros_like(tokens[:, 1:]),
        neighbours_BLKR=torch.randint(model.vocab_size, of_neighbours),
        neighbour_mask_BLKR=torch.ones(of_neighbours, dtype=torch.bool),
    )
    return StepBatch(step=0, batch=batch, num_targets=batch.targets_BT.numel())
