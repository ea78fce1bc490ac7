"""torch.compile for training on a GPU, where it fuses what lies between the products, and attention with its masks.

A block is compiled at a time: those of one kind share what is compiled, so that a model starts within a minute
whatever its depth, and DDP and FSDP see each block's gradients when they are there. Scoring and generating, whose
shapes change from one batch to the next, stay as they are.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import torch
from torch import nn

from retro_ray.config import Compile
from retro_ray.model.retro import RetroModel


def resolve_compile(compile_: Compile, device: torch.device) -> bool:
    """What `auto` means on `device`: a GPU that Triton writes kernels for, where there is the C compiler it needs."""
    if compile_ != "auto":
        return compile_ == "yes"
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return has_triton and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def decoder_blocks(model: RetroModel) -> Iterator[nn.Module]:
    """The blocks of its layers."""
    for layer in model.layers:
        yield from (block for block in (layer.self_attention, layer.cca, layer.feed_forward) if block is not None)


def compile_blocks(model: RetroModel, device: torch.device) -> None:
    """Compile them for training, each at its first call; before FSDP takes them apart."""
    model.attends_in_blocks = device.type == "cuda"  # FlexAttention has no backward pass on a CPU
    for block in (*decoder_blocks(model), *(model.encoder.layers if model.encoder else ()), model.pointer):
        if block is not None:
            block.compile(dynamic=False)
