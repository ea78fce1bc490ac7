"""Which arithmetic is the fastest of a device."""

from __future__ import annotations

import torch


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
