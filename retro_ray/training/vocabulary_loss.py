"""Cross-entropy over the vocabulary without ever holding the logits of all positions.

The logits of a micro-batch are by far its largest tensor (8 x 1,024 positions x 32,768 tokens: 1 GiB
in fp32, and as much again for their softmax and their gradient). Here they are computed for some
positions at a time, and turned into the gradients of activations and weights at once, as Hsu et al.
2024 (Liger Kernel) do: no logit is kept or computed again for the backward pass.

Where neighbour tokens are pointed at, a target's probability is that of a mixture, kept * softmax + given, and the
softmax's slopes are those of a plain loss times its part in that probability. What can be copied is then hardly learnt
by the softmax; so that it is, a share of the loss may be the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from retro_ray.model.int8_training import Int8ReadOut, is_worthwhile
from retro_ray.model.pointer import DecoderOutput

# fp32 logits that exist at once: on a CPU 16 MiB, near what its caches hold; enough for full speed on a GPU.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
# Slopes (d nats / d logits) of so many positions, in the products' type, make one product with their activations:
# each adds to a sum as large as the weights, which few of them should do.
_SLOPES_AT_ONCE = 1 << 25
_TILE = 64
"""Positions in a product are a multiple of it, if they are more."""
_MOST_NATS = 80.0
"""Of a target, for the slope of what is given to it, which is one over its probability and must stay finite."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        log_kept_N: torch.Tensor | None,
        given_N: torch.Tensor | None,
        dtype: torch.dtype,
        plain_share: float,
        compiled: bool,
        in_int8: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = h_ND.device
        real_N, targets_N = targets_N >= 0, targets_N.clamp_min(0)
        gradient_h = torch.empty_like(h_ND)
        gradient_weight = None if ctx.needs_input_grad[1] is False else torch.zeros_like(weight_VD)
        plain_nats_N = torch.empty(len(h_ND), dtype=torch.promote_types(dtype, torch.float32), device=device)
        nats_N, softmax_part_N = plain_nats_N, None
        if log_kept_N is not None:
            nats_N, softmax_part_N = torch.empty_like(plain_nats_N), torch.empty_like(plain_nats_N)
        at_once, size = _positions(len(h_ND), len(weight_VD), device, compiled)
        if in_int8:
            read_out = Int8ReadOut(weight_VD, size, at_once)
        else:
            read_out = _PlainReadOut(weight_VD, size, at_once, dtype, compiled)
        for start in range(0, len(h_ND), max(1, size)):
            part = slice(start, start + size)
            h, weights_N = h_ND[part].to(dtype), None
            plain_nats_N[part], gradient_h[part] = read_out.nats_and_gradient(h, targets_N[part], real_N[part])
            if log_kept_N is not None and given_N is not None and softmax_part_N is not None:
                log_by_softmax = log_kept_N[part] - plain_nats_N[part]
                nats_N[part] = -torch.logaddexp(log_by_softmax, given_N[part].log())
                softmax_part_N[part] = (log_by_softmax + nats_N[part]).exp()
                # Slopes times a number for each position: of the products it takes fewer than of the slopes.
                weights_N = plain_share + (1 - plain_share) * softmax_part_N[part]
                gradient_h[part] *= weights_N[:, None]
            if gradient_weight is not None:
                read_out.add_gradient(gradient_weight, h, weights_N, targets_N[part], real_N[part])
        nats_N = nats_N * real_N
        mixed_share, mixed_share_N = 1 - plain_share, real_N * (plain_share - 1)
        of_log_kept = None if softmax_part_N is None else mixed_share_N * softmax_part_N
        of_given = None if given_N is None else mixed_share_N * nats_N.clamp(max=_MOST_NATS).exp()
        ctx.save_for_backward(gradient_h, gradient_weight, of_log_kept, of_given)
        nats = nats_N.sum()
        loss = nats.clone() if log_kept_N is None else mixed_share * nats + plain_share * plain_nats_N.sum()
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, _ = gradients
        of_h, of_weight, of_log_kept, of_given = (None if x is None else x * scale for x in ctx.saved_tensors)
        return of_h, of_weight, None, of_log_kept, of_given, None, None, None, None


class _PlainReadOut:
    """Products in one type, of all positions at once but for the logits.

    Positions are columns here: of all orders of the three products, a CPU's bf16 multiplies these in half the time of
    others, transposing the weights included.
    """

    def __init__(
        self, weight_VD: torch.Tensor, num_positions: int, num_at_once: int, dtype: torch.dtype, compiled: bool
    ) -> None:
        self._weight_VD = weight_VD.to(dtype)
        self._weight_DV = self._weight_VD.T.contiguous()
        self._num_at_once = num_at_once
        self._nats_type = torch.promote_types(dtype, torch.float32)
        vocab_size, device = len(weight_VD), weight_VD.device
        if compiled:
            self._nats_and_slopes = _fused_nats_and_slopes()
        else:
            buffer_VN = torch.empty(vocab_size, min(num_positions, num_at_once), dtype=self._nats_type, device=device)
            self._nats_and_slopes = partial(_nats_and_slopes, buffer_VN=buffer_VN)
        self._slopes_VN = torch.empty(vocab_size, num_positions, dtype=dtype, device=device)

    def nats_and_gradient(
        self, h_ND: torch.Tensor, targets_N: torch.Tensor, real_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats [N], and their gradients of h [N, D]. Both are zero for a target that is not real."""
        nats_N, slopes_VN = torch.empty(len(h_ND), dtype=self._nats_type, device=h_ND.device), self._slopes_of(h_ND)
        for first in range(0, len(h_ND), self._num_at_once):
            some = slice(first, first + self._num_at_once)
            logits_VN = self._weight_VD @ h_ND[some].T
            nats_N[some] = self._nats_and_slopes(logits_VN, targets_N[some], real_N[some], slopes_VN[:, some])
        return nats_N, (self._weight_DV @ slopes_VN).T

    def add_gradient(
        self,
        of_weight_VD: torch.Tensor,
        h_ND: torch.Tensor,
        weights_N: torch.Tensor | None,
        targets_N: torch.Tensor,
        real_N: torch.Tensor,
    ) -> None:
        """Adds the gradient that nats of the last positions, times `weights`, give the read-out."""
        weighted_ND = h_ND if weights_N is None else (h_ND * weights_N[:, None]).to(h_ND.dtype)
        of_weight_VD += self._slopes_of(h_ND) @ weighted_ND

    def _slopes_of(self, h_ND: torch.Tensor) -> torch.Tensor:
        return self._slopes_VN[:, : len(h_ND)]


def _positions(num_positions: int, vocab_size: int, device: torch.device, compiled: bool) -> tuple[int, int]:
    """Of how many positions there are logits at once, and slopes."""
    at_once = _in_tiles(LOGITS_AT_ONCE["cpu" if device.type == "cpu" else "cuda"] // vocab_size)
    if compiled:  # parts of one size are compiled for once
        num_parts = max(1, math.ceil(num_positions / at_once))
        at_once = min(at_once, _TILE * math.ceil(num_positions / (num_parts * _TILE)))
    return at_once, min(num_positions, max(at_once, 0 if compiled else _in_tiles(_SLOPES_AT_ONCE // vocab_size)))


def _in_tiles(num_positions: int) -> int:
    """So many or a few less, at least one."""
    return max(1, num_positions - num_positions % _TILE if num_positions > _TILE else num_positions)


def _nats_and_slopes(
    logits_VN: torch.Tensor,
    targets_N: torch.Tensor,
    real_N: torch.Tensor,
    slopes_VN: torch.Tensor,
    *,
    buffer_VN: torch.Tensor,
) -> torch.Tensor:
    """Nats [N]; their slopes, softmax - one-hot, are written to `slopes_VN`. Both are zero for a target that is not
    real. The buffer is overwritten.
    """
    logits = buffer_VN[:, : logits_VN.shape[1]].copy_(logits_VN)
    of_targets = logits.gather(0, targets_N[None])
    highest = logits.amax(dim=0, keepdim=True)
    shares = logits.sub_(highest).exp_()
    total = shares.sum(dim=0, keepdim=True)
    nats_N = (total.log() + highest - of_targets)[0]
    shares.div_(total.masked_fill(~real_N, math.inf))
    shares.scatter_add_(0, targets_N[None], -real_N[None].to(shares.dtype))
    slopes_VN.copy_(shares)
    return nats_N * real_N


@cache
def _fused_nats_and_slopes() -> Callable[..., torch.Tensor]:
    """`_nats_and_slopes` as few kernels of a GPU, which leave no copy of the logits."""

    def nats_and_slopes(
        logits_VN: torch.Tensor, targets_N: torch.Tensor, real_N: torch.Tensor, slopes_VN: torch.Tensor
    ) -> torch.Tensor:
        logits = logits_VN.to(torch.promote_types(logits_VN.dtype, torch.float32))
        highest_N = logits.amax(0)
        shares = (logits - highest_N).exp()
        total_N = shares.sum(0)
        is_target = torch.arange(len(logits), device=logits.device)[:, None] == targets_N
        slopes_VN.copy_((shares / total_N - is_target.to(shares.dtype)) * real_N)
        return (total_N.log() + highest_N - logits.gather(0, targets_N[None])[0]) * real_N

    return torch.compile(nats_and_slopes, dynamic=False)


def vocabulary_loss(
    output: DecoderOutput,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    plain_share: float = 0.0,
    compiled: bool = False,
    in_int8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be minimised, and the nats of the targets under `RetroModel.read_out` of an output: both sums, fp32 or
    wider.

    Args:
        output: of N positions.
        weight_VD: the read-out; where it is not trained, its gradients are not computed.
        targets_N: int64, from 0 to V - 1; what is negative is no target, and costs as much as one.
        plain_share: with a pointer, the share of nats without it in what is minimised; else that is the nats.
        compiled: what is not a product is (torch.compile), for a GPU.
        in_int8: products are of eight bits (int8_training.py) where that is worthwhile.
    """
    h_ND, pointed = output.hidden, output.pointed
    device = h_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    in_int8 = in_int8 and is_worthwhile(h_ND, weight_VD)
    log_kept_N, given_N = (None, None) if pointed is None else (pointed.log_kept, pointed.given_to(targets_N))
    with torch.autocast(device, enabled=False):  # the products' types are chosen above
        return _LinearCrossEntropy.apply(
            h_ND, weight_VD, targets_N, log_kept_N, given_N, dtype, plain_share, compiled, in_int8
        )
