"""Cross-entropy over the vocabulary without ever holding the logits of all positions.

The logits of a micro-batch are by far its largest tensor (8 x 1,024 positions x 32,768 tokens: 1 GiB
in fp32, and as much again for their softmax and their gradient). Here they are computed for some
positions at a time, and turned into the gradients of activations and weights at once, as Hsu et al.
2024 (Liger Kernel) do: no logit is kept or computed again for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits that exist at once: 16 MiB in fp32 on a CPU, near what its caches hold; enough for full speed on a GPU.
_LOGITS_AT_ONCE = {"cpu": 1 << 22}
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 26


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        weight = weight_VD.to(dtype)
        gradient_h = torch.empty_like(h_ND)
        gradient_weight = torch.zeros_like(weight_VD)
        nats = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=h_ND.device)
        num_logits = _LOGITS_AT_ONCE.get(h_ND.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
        size = min(len(h_ND), max(1, num_logits // len(weight_VD)))
        buffer = torch.empty(size, len(weight_VD), dtype=nats.dtype, device=h_ND.device)
        for start in range(0, len(h_ND), max(1, size)):
            part = slice(start, start + size)
            h, targets = h_ND[part].to(dtype), targets_N[part, None]
            logits = buffer[: len(h)].copy_(h @ weight.T)
            of_targets = logits.gather(1, targets)
            highest = logits.amax(dim=-1, keepdim=True)
            # In place from here on: d nats / d logits = softmax - one-hot.
            slope = logits.sub_(highest).exp_()
            total = slope.sum(dim=-1, keepdim=True)
            nats += (total.log() + highest - of_targets).sum()
            slope.div_(total).scatter_add_(1, targets, torch.full_like(of_targets, -1))
            slope = slope.to(dtype)
            gradient_h[part] = slope @ weight
            gradient_weight += slope.T @ h
        ctx.save_for_backward(gradient_h, gradient_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (scale,) = gradients
        gradient_h, gradient_weight = ctx.saved_tensors
        return gradient_h * scale, gradient_weight * scale, None, None


def vocabulary_loss(h_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Nats of the targets under the logits h weight^T, summed: a scalar, fp32 or wider.

    Args:
        h_ND: activations of N positions.
        weight_VD: the read-out.
        targets_N: int64, from 0 to V - 1.
    """
    device = h_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    with torch.autocast(device, enabled=False):  # the products' types are chosen above
        return _LinearCrossEntropy.apply(h_ND, weight_VD, targets_N, dtype)
