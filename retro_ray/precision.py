"""In which arithmetic a device computes: what it has, and what is asked for."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

from retro_ray.config import Precision
from retro_ray.errors import ConfigError

LEAST_INT8_WIDTH = 384
"""Of narrower products bf16 is as fast."""


def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16 products.

    A CPU without them emulates bf16 and is slower with it than in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("sve_bf16"))


def int8_is_fastest(device: torch.device) -> bool:
    """Whether whole numbers of eight bits, added up in 32, are what `device` multiplies fastest, in training too.

    So on CPUs with instructions for them and none for matrices, with which bf16 is as fast as is needed.
    """
    capabilities = torch.cpu.get_capabilities()
    has_matrices = bool(capabilities.get("amx_bf16") or capabilities.get("amx_tile"))
    return device.type == "cpu" and bf16_is_fast(device) and bool(capabilities.get("avx512_vnni")) and not has_matrices


def resolve_precision(
    precision: Precision, device: torch.device, trained_width: int = 0
) -> Literal["int8", "bf16", "fp32"]:
    """What `auto` means on `device`: int8 to train a model of a width at which that is fastest there, else bf16 where
    the hardware multiplies it.

    Raises:
        ConfigError: it is int8 on a GPU.
    """
    if precision == "int8" and device.type != "cpu":
        raise ConfigError(f"precision is int8, which is for CPUs; on {device.type} take bf16")
    if precision != "auto":
        return precision
    if trained_width >= LEAST_INT8_WIDTH and int8_is_fastest(device):
        return "int8"
    return "bf16" if bf16_is_fast(device) else "fp32"


def arithmetic(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """The context of forward passes: bf16 by autocast, the weights stay fp32; int8 differs in training alone."""
    if resolve_precision(precision, device) == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
