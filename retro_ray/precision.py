"""Whether bf16 is the faster arithmetic of a device."""

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
