"""Data-parallel training: each worker with the whole model (DDP), or with a part of it (FSDP2).

With FSDP a block's weights are put together when it computes, and taken apart behind it; gradients and
the optimiser's state exist in parts alone. A checkpoint is the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from retro_ray.config import Parallel
from retro_ray.model.retro import RetroModel
from retro_ray.training.compiled import decoder_blocks

if TYPE_CHECKING:  # a second to import, in every process that trains, evaluates or serves; only FSDP needs them
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


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
    from torch.distributed.fsdp import fully_shard

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
    parts = [module for module in loss.modules() if _is_in_parts(module)]
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
        whole_tensor = whole(tensor)
        if keep:
            found[name] = whole_tensor.detach().cpu().contiguous()
    return found


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each worker may have a part; all workers must call it."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """What a worker has of a whole tensor, if of another one it has `like`; on the same device."""
    tensor = tensor.to(like.device)
    if not _is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def _is_in_parts(module: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(module, "unshard")
