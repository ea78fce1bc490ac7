"""Attention without weights: the kernel for a shape and a machine, what a query may look at, and heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from retro_ray.model.causal_attention import causal_attention, refusal
from retro_ray.model.rms_norm import has_many_rows_on_cpu

# On a CPU two matrix products around a softmax beat the fused kernel: forward and backward in bfloat16
# in a quarter of its time for the short sequences of encoder and CCA, in half for 512 positions, in
# three quarters for 1024. At 2048 they are level, and the fused kernel saves the memory of the scores.
_PLAIN_MAX_POSITIONS = 1024
# Causal attention that keeps its weights for a backward pass. It is ahead still at this length, where
# they take 75 MB of each 16 heads.
_TRAINED_MAX_POSITIONS = 2048

# FlexAttention's kernels are for these.
FLEX_HEAD_DIMS = (16, 32, 64, 128, 256)
# For heads of 64 in bf16 its own choice of tiles is not the best: on an H200, 16 x 16 heads of 2,048 positions take
# 2.05 ms forward and backward with these, 2.47 without. They need 64 KiB of a multiprocessor's shared memory, which
# every GPU of NVIDIA that multiplies bf16 has.
_FLEX_TILES: Any = {
    **{"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4},
    **{"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64},
    **{"bwd_num_warps": 4, "bwd_num_stages": 3},
}

KeysValues = tuple[Tensor, Tensor]
Mask = Tensor | BlockMask
"""bool, True where a query may look; or what is added to the scores; or a rule, with blocks in which nobody may look
left out."""


def causal_within(segments_BT: Tensor, in_blocks: bool) -> Mask:
    """[B, 1, T, T]: a position sees those of its own segment up to itself."""
    batch_size, length = segments_BT.shape
    if in_blocks:

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (segments_BT[b, query] == segments_BT[b, key])

        return _block_mask()(sees, batch_size, None, length, length, device=segments_BT.device.type)
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]


@cache
def _block_mask() -> Callable[..., BlockMask]:
    """`create_block_mask`, compiled: a millisecond of a training step in place of nine."""
    return torch.compile(create_block_mask)


def attend(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Mask | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, [B, H, T, E].

    Args:
        q_BHTE: queries.
        k_BGSE: keys; each of their G heads is for H / G consecutive heads of queries.
        v_BGSE: values.
        mask: broadcastable to [B, H, T, S]. Every query must be allowed at least one key (see
            `open_empty_rows`).
        causal: query t sees keys up to t, as `mask` says too if there is one.
    """
    if isinstance(mask, BlockMask):
        grouped = q_BHTE.shape[1] != k_BGSE.shape[1]
        measured = q_BHTE.shape[-1] == 64 and q_BHTE.element_size() == 2 and torch.version.hip is None
        options = _FLEX_TILES if measured else None
        out = flex_attention(q_BHTE, k_BGSE, v_BGSE, block_mask=mask, enable_gqa=grouped, kernel_options=options)
        return cast("Tensor", out)  # a tuple only if more is asked for
    num_queries, num_keys = q_BHTE.shape[-2], k_BGSE.shape[-2]
    on_cpu = q_BHTE.device.type == "cpu"
    if causal and num_queries <= _TRAINED_MAX_POSITIONS and has_many_rows_on_cpu(q_BHTE):
        if (shared_by := q_BHTE.shape[1] // k_BGSE.shape[1]) > 1:
            k_BGSE, v_BGSE = (x.repeat_interleave(shared_by, dim=1) for x in (k_BGSE, v_BGSE))
        return causal_attention(q_BHTE, k_BGSE, v_BGSE, mask)
    if not on_cpu or min(num_queries, num_keys) > _PLAIN_MAX_POSITIONS:
        grouped = q_BHTE.shape[1] != k_BGSE.shape[1]
        return F.scaled_dot_product_attention(
            q_BHTE, k_BGSE, v_BGSE, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
        )
    if causal and mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHTE.device).tril()
    return product_by_heads(attention_weights(q_BHTE, k_BGSE, mask), v_BGSE)


def attention_weights(q_BHTE: Tensor, k_BGSE: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)), [B, H, T, S]."""
    scores = product_by_heads(q_BHTE * q_BHTE.shape[-1] ** -0.5, k_BGSE.transpose(-1, -2))
    if mask is not None:
        scores.add_(added_to_scores(mask, scores.dtype))
    return scores.softmax(dim=-1)


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What `mask` adds to scores, if it does not say so itself."""
    return refusal(~mask, dtype) if mask.dtype == torch.bool else mask


def product_by_heads(x_BHTX: Tensor, y_BGXY: Tensor) -> Tensor:
    """The product x y, [B, H, T, Y], each head of y for H / G consecutive heads of x, without copies of y."""
    num_heads, num_rows = x_BHTX.shape[1:3]
    if num_heads == y_BGXY.shape[1]:
        return x_BHTX @ y_BGXY
    # The heads that share a head of y become further rows of one product.
    grouped = x_BHTX.unflatten(1, (y_BGXY.shape[1], -1)).flatten(2, 3)
    return (grouped @ y_BGXY).unflatten(2, (-1, num_rows)).flatten(1, 2)


def open_empty_rows(mask: Tensor) -> Tensor:
    """`mask`, but where it allows no key of the last dimension, all: a softmax over nothing is NaN.

    What such a query reads must be harmless: zero values, or an output that nobody uses.
    """
    return mask | ~mask.any(dim=-1, keepdim=True)


def split_heads(x_BTD: Tensor, head_dim: int) -> Tensor:
    """[B, T, H * E] -> [B, H, T, E], a view."""
    return x_BTD.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x_BHTE: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, H * E]."""
    return x_BHTE.transpose(1, 2).flatten(2)
