"""The optimiser: AdamW, or Muon for the matrices inside the blocks; its schedule and its state.

Muon is torch's, with the scaling of Liu et al. 2025 (Moonlight), under which it takes the learning
rate and the weight decay of AdamW.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from retro_ray.config import TrainingConfig
from retro_ray.errors import CheckpointError
from retro_ray.training.parallel import own_part

FIRST_LEARNING_RATE = 1e-7
"""Where the warm-up starts (paper, appendix C)."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Of the step counted from 0: linear warm-up, then a cosine that ends at the last step."""
    highest, warmup = config.learning_rate, config.num_warmup_steps
    if step < warmup:
        return FIRST_LEARNING_RATE + (highest - FIRST_LEARNING_RATE) * step / warmup
    progress = (step - warmup) / max(1, config.num_steps - 1 - warmup)
    lowest = highest * config.final_learning_rate_share
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimizer:
    """One or two torch optimisers that act as one, with their state under the parameters' names."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self._config = config
        self._names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        outside_blocks = {id(p) for p in _vocabulary_parameters(model)}
        muon = [
            p
            for p in self._names.values()
            if config.optimizer == "muon" and p.ndim == 2 and id(p) not in outside_blocks
        ]
        by_muon = {id(p) for p in muon}
        rest = [p for p in self._names.values() if id(p) not in by_muon]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (config.adam_beta1, config.adam_beta2)
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=betas, fused=True
        )
        self._optimizers: list[torch.optim.Optimizer] = [adamw]
        if muon:
            self._optimizers.append(
                torch.optim.Muon(
                    muon,
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are trained."""
        return list(self._names.values())

    def step(self, step: int) -> float:
        """Apply the gradients as step `step`, counted from 0, and clear them; returns the learning rate."""
        rate = learning_rate(step, self._config)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return rate

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state, as `<parameter>/<kind>`."""
        return {
            f"{name}/{kind}": value
            for name, parameter in self._names.items()
            for optimizer in self._optimizers
            for kind, value in optimizer.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the state that `tensors` gave.

        Raises:
            CheckpointError: it is the state of another model or another optimiser.
        """
        owner = {
            id(p): optimizer for optimizer in self._optimizers for g in optimizer.param_groups for p in g["params"]
        }
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            if name not in self._names:
                raise CheckpointError(
                    f"the optimiser state has {key}, which the model has not: resume with the settings of the run"
                )
            parameter = self._names[name]
            optimizer = owner[id(parameter)]
            expected = (
                {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
            )
            if kind not in expected:
                raise CheckpointError(
                    f"the optimiser state of {name} has {kind}, expected {sorted(expected)}: resume with the "
                    "--optimizer of the run"
                )
            whole = value.ndim == 0  # the number of steps
            optimizer.state[parameter][kind] = value.to(parameter.device) if whole else own_part(value, parameter)


def _vocabulary_parameters(model: nn.Module) -> list[torch.Tensor]:
    """Embeddings and read-out: their rows are tokens, not directions, so that Muon is not for them."""
    found: list[torch.Tensor] = [
        p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    ]
    vocab_size = max((p.shape[0] for p in found), default=0)
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return found + [weight for weight in linear if weight.shape[0] == vocab_size]
