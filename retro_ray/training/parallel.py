"""Data-parallel training: each worker with the whole model (DDP), or with a part of it (FSDP2).

With FSDP a block's weights are put together when it computes, and taken apart behind it; gradients and
the optimiser's state exist in parts alone. A checkpoint is the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from retro_ray.model.retro import RetroModel
from retro_ray.training.compiled import decoder_blocks

Parallel = Literal["ddp", "fsdp"]


def join_workers(loss: nn.Module, model: RetroModel, parallel: Parallel, device: torch.device) -> nn.Module:
    """`loss`, whose forward pass is that of `model`, with gradients averaged over the process group.

    With FSDP the model's parameters are others afterwards: an optimiser is made behind this.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return loss
    if parallel == "ddp":
        # Without neighbours (num_neighbours = 0) the retrieval layers get no gradients.
        return DistributedDataParallel(
            loss,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(model.config.cca_layers),
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in (*decoder_blocks(model), model.encoder, model.pointer):
        if block is not None:
            fully_shard(block, mesh=mesh)
    fully_shard(loss, mesh=mesh)  # what is left: embeddings, the last norm, the read-out
    return loss


@contextmanager
def whole_weights(loss: nn.Module) -> Iterator[None]:
    """Every worker has all weights for a while, and may compute what the others do not.

    All workers must enter and leave it together, when a step has been taken.
    """
    parts = [module for module in loss.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not loss, recurse=False)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole of tensors of which each worker has a part, on the CPU; empty where they are not to be kept.

    All workers must call it with the same names.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.detach().cpu().contiguous()
    return found


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What a worker has of `whole`, if of another tensor it has `like`; on the same device."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
