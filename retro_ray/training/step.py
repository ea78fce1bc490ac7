"""One training step: loss in nats over all workers' target tokens, gradients, clipping, update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retro_ray.config import TrainingConfig
from retro_ray.model.layers import Linear
from retro_ray.model.retro import RetroModel
from retro_ray.precision import arithmetic, resolve_precision
from retro_ray.training.batches import StepBatch
from retro_ray.training.compiled import compile_blocks, resolve_compile
from retro_ray.training.optimizer import Optimizer
from retro_ray.training.parallel import join_workers, whole, whole_weights
from retro_ray.training.vocabulary_loss import vocabulary_loss
from retro_ray.training.windows import NO_TARGET, Batch


class NextTokenLoss(nn.Module):
    """The model and its loss as one module, so that DDP sees the whole forward pass."""

    def __init__(
        self, model: RetroModel, plain_loss_share: float = 0.0, compiled: bool = False, in_int8: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._plain_loss_share = plain_loss_share
        self._compiled = compiled
        self._in_int8 = in_int8

    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        neighbours_BLKR: torch.Tensor | None,
        neighbour_mask_BLKR: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, and nats, both summed over the targets: fp32 scalars."""
        output = self.model.output(
            tokens_BT,
            neighbours_BLKR=neighbours_BLKR,
            neighbour_mask_BLKR=neighbour_mask_BLKR,
            segments_BT=segments_BT,
        )
        weight, share = self.model.read_out_weight, self._plain_loss_share
        if self._compiled:  # its shapes are to be those of every step, and a GPU not to be waited for
            return vocabulary_loss(output.flatten(), weight, targets_BT.flatten(), share, compiled=True)
        # Padding is left out before the read-out, the largest single product of a small model.
        asked = targets_BT != NO_TARGET
        return vocabulary_loss(output[asked], weight, targets_BT[asked], share, in_int8=self._in_int8)


@dataclass(frozen=True)
class StepResult:
    """What a step did; tensors, so that a GPU need not be waited for."""

    loss: torch.Tensor
    """Mean nats per target token, over all workers: fp32 scalar."""
    gradient_norm: torch.Tensor
    """Before clipping."""
    learning_rate: float


class TrainingStep:
    """Updates `model` by one batch at a time, alone or as one worker of a process group.

    The loss of a step is sum of nats / number of targets, both over all micro-batches and workers:
    the curve does not depend on how a batch is divided.
    """

    def __init__(self, model: RetroModel, config: TrainingConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._compiled = resolve_compile(config.compile, device)
        if self._compiled:
            compile_blocks(model, device)
        in_int8 = resolve_precision(config.precision, device, model.config.hidden_dim) == "int8"
        for module in model.modules():
            if isinstance(module, Linear):
                module.trains_in_int8 = in_int8
        loss = NextTokenLoss(model, config.plain_loss_share, self._compiled, in_int8)
        self._module = join_workers(loss, model, config.parallel, device)
        self.optimizer = Optimizer(model, config)

    def run(self, share: StepBatch) -> StepResult:
        """One update by this worker's share of a batch."""
        size = self._config.micro_batch_size
        starts = range(0, len(share.batch), size)
        total = torch.zeros((), device=self._device)
        for start in starts:
            batch = share.batch.rows(start, start + size).to(self._device)
            with self._synchronised(start == starts[-1]), self._arithmetic():
                loss, nats = self._forward(batch)
                # DDP averages gradients over the workers; the loss is a sum over them.
                (loss * (self._world_size / share.num_targets)).backward()
            total += nats.detach()
        if self._world_size > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.optimizer.parameters, self._config.max_gradient_norm)
        rate = self.optimizer.step(share.step)
        return StepResult(loss=total / share.num_targets, gradient_norm=whole(norm), learning_rate=rate)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """While it is held, the model may be used by each worker alone, as for a validation between steps."""
        # Nothing is compiled for what comes in other shapes each time.
        eager = torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext()
        with whole_weights(self._module), eager:
            yield

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._module(
            batch.tokens_BT, batch.targets_BT, batch.segments_BT, batch.neighbours_BLKR, batch.neighbour_mask_BLKR
        )

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged with the last micro-batch only; with FSDP with each, which keeps them in parts."""
        if last or not isinstance(self._module, DistributedDataParallel):
            yield
        else:
            with self._module.no_sync():
                yield

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        return arithmetic(self._config.precision, self._device)
