"""Cross-entropy over the vocabulary without ever holding the logits of all positions.

The logits of a micro-batch are by far its largest tensor (8 x 1,024 positions x 32,768 tokens: 1 GiB
in fp32, and as much again for their softmax and their gradient). Here they are computed for some
positions at a time, and turned into the gradients of activations and weights at once, as Hsu et al.
2024 (Liger Kernel) do: no logit is kept or computed again for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

# fp32 logits that exist at once: on a CPU 16 MiB, near what its caches hold; enough for full speed on a GPU.
_LOGITS_AT_ONCE = {"cpu": 1 << 22}
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 26
# Slopes (d nats / d logits) of so many positions, in the products' type, make one product with their activations:
# each adds to a sum as large as the weights, which few of them should do.
_SLOPES_AT_ONCE = 1 << 25


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        weight, vocab_size, device = weight_VD.to(dtype), len(weight_VD), h_ND.device
        gradient_h = torch.empty_like(h_ND)
        gradient_weight = None if ctx.needs_input_grad[1] is False else torch.zeros_like(weight_VD)
        nats = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device)
        step = max(1, _LOGITS_AT_ONCE.get(device.type, _LOGITS_AT_ONCE_ELSEWHERE) // vocab_size)
        size = min(len(h_ND), max(step, _SLOPES_AT_ONCE // vocab_size))
        logits = torch.empty(min(size, step), vocab_size, dtype=nats.dtype, device=device)
        slopes = torch.empty(size, vocab_size, dtype=dtype, device=device)
        for start in range(0, len(h_ND), max(1, size)):
            part = slice(start, start + size)
            h, targets = h_ND[part].to(dtype), targets_N[part, None]
            slope = slopes[: len(h)]
            for first in range(0, len(h), step):
                some = slice(first, first + step)
                nats += _nats_and_slopes(h[some] @ weight.T, targets[some], logits, slope[some])
            gradient_h[part] = slope @ weight
            if gradient_weight is not None:
                gradient_weight += slope.T @ h
        ctx.save_for_backward(gradient_h, gradient_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        (scale,) = gradients
        gradient_h, gradient_weight = ctx.saved_tensors
        return gradient_h * scale, None if gradient_weight is None else gradient_weight * scale, None, None


def _nats_and_slopes(
    logits_NV: torch.Tensor, targets_N1: torch.Tensor, buffer: torch.Tensor, slopes_NV: torch.Tensor
) -> torch.Tensor:
    """The sum of nats; their slopes, softmax - one-hot, are written to `slopes_NV`. `buffer` is overwritten."""
    logits = buffer[: len(logits_NV)].copy_(logits_NV)
    of_targets = logits.gather(1, targets_N1)
    highest = logits.amax(dim=-1, keepdim=True)
    shares = logits.sub_(highest).exp_()
    total = shares.sum(dim=-1, keepdim=True)
    nats = (total.log() + highest - of_targets).sum()
    shares.div_(total).scatter_add_(1, targets_N1, torch.full_like(of_targets, -1))
    slopes_NV.copy_(shares)
    return nats


def vocabulary_loss(h_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Nats of the targets under the logits h weight^T, summed: a scalar, fp32 or wider.

    Args:
        h_ND: activations of N positions.
        weight_VD: the read-out; where it is not trained, its gradients are not computed.
        targets_N: int64, from 0 to V - 1.
    """
    device = h_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    with torch.autocast(device, enabled=False):  # the products' types are chosen above
        return _LinearCrossEntropy.apply(h_ND, weight_VD, targets_N, dtype)
