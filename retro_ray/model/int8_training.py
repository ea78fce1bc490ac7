"""Linear layers in training on a CPU whose fastest products are of eight bits.

All three products of a linear layer, y = x W^T and the gradients of x and W, multiply whole numbers and add them up in
32 bits, twice as fast as bf16 where a CPU has instructions for that and none for matrices (AVX-512 VNNI without AMX).
Rows of x and of W become multiples of a 127th of their largest component. A step belongs to a row that is added up, so
that sums can be scaled afterwards; where rows meet in the sum of a product (those of W in the gradient of x, those of
x in that of W) their steps are multiplied to the slopes, before these are rounded: by rows for the one, by columns for
the other. So do Wortsman et al. 2023 for the first two products; the third they leave in 16 bits, since tokens whose
slopes are less than half a step of the largest are lost. Here what one token loses is carried to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from retro_ray.model import compiled_training
from retro_ray.model.compiled_loops import (
    SMALLEST_TRAINED_STEP,
    as_array,
    as_array_of_weights,
    use_threads_of_torch,
)
from retro_ray.precision import LEAST_INT8_WIDTH

_SUMS_AT_ONCE = 1 << 23
"""int32, 32 MiB: they are to be in the caches still when they are scaled."""
_TILE = 64
"""Rows of a product are a multiple of it, if they are more."""
_LEAST_ROWS = 256


# No public operation adds up products of eight bits in 32.
multiply_int8 = torch.ops.aten._int_mm


def is_worthwhile(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether to train this product in eight bits."""
    num_rows = x.numel() // x.shape[-1]
    enough = num_rows >= _LEAST_ROWS and min(weight_OI.shape) >= LEAST_INT8_WIDTH
    in_training = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    return enough and in_training and not torch.compiler.is_compiling()


def int8_product(x: Tensor, weight_OI: Tensor, gelu: bool = False) -> Tensor:
    """X W^T for x [..., I], or GELU of it: bfloat16 [..., O]. W is float32, as its gradient will be."""
    return _Product.apply(x, weight_OI, gelu)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, gelu: bool) -> Tensor:
        use_threads_of_torch()
        x_NI = x.reshape(-1, x.shape[-1]).contiguous()
        x8_NI, x_steps_N = _rounded(x_NI)
        w8_OI, w_steps_O = _rounded(weight_OI.contiguous())
        y_NO = torch.empty(len(x_NI), len(weight_OI), dtype=torch.bfloat16)
        before_NO = torch.empty_like(y_NO) if gelu else None
        _multiply(x8_NI, w8_OI.T, x_steps_N, w_steps_O, y_NO, before_NO)
        ctx.save_for_backward(x8_NI, x_steps_N, w8_OI, w_steps_O, before_NO)
        ctx.x_type = x.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        use_threads_of_torch()
        x8_NI, x_steps_N, w8_OI, w_steps_O, before_NO = ctx.saved_tensors
        slopes = gradients[0]
        slopes_NO = slopes.reshape(len(x8_NI), -1).to(torch.bfloat16).contiguous()
        largest = torch.empty(compiled_training.num_blocks(len(slopes_NO)), slopes_NO.shape[1], dtype=torch.int32)
        by_rows_NO, row_steps_N = torch.empty_like(slopes_NO, dtype=torch.int8), torch.empty(len(slopes_NO))
        kept_NO = None if before_NO is None else torch.empty_like(slopes_NO)
        compiled_training.round_slopes_by_rows(
            *_arrays(slopes_NO, before_NO, w_steps_O, x_steps_N, by_rows_NO, row_steps_N, kept_NO, largest)
        )
        of_x = of_weight_OI = None
        if ctx.needs_input_grad[0]:
            of_x_NI = torch.empty(x8_NI.shape, dtype=torch.bfloat16)
            _multiply(by_rows_NO, w8_OI, row_steps_N, None, of_x_NI)
            of_x = of_x_NI.view(*slopes.shape[:-1], -1).to(ctx.x_type)
        if ctx.needs_input_grad[1]:
            column_steps_O = (
                largest.amax(0).view(torch.float32) / compiled_training.LARGEST_SLOPE + SMALLEST_TRAINED_STEP
            )
            by_columns_NO = by_rows_NO  # no longer needed
            compiled_training.round_slopes_by_columns(
                *_arrays(slopes_NO if kept_NO is None else kept_NO, x_steps_N, 1 / column_steps_O, by_columns_NO)
            )
            of_weight_OI = torch.empty(w8_OI.shape)
            _multiply(by_columns_NO.T, x8_NI, column_steps_O, None, of_weight_OI)
        return of_x, of_weight_OI, None


class Int8ReadOut:
    """The three products of a read-out and its loss, for a part of the positions after the other.

    Both gradients are of a softmax, whose shares are rounded alone, and of targets, which are added exactly: next to
    the 1 of a target all other shares would be rounded to nothing, though together they weigh as much.

    Args:
        weight_VD: float32, the read-out.
        num_positions: the most of a part.
        num_at_once: of how many of them there are logits.
    """

    def __init__(self, weight_VD: Tensor, num_positions: int, num_at_once: int) -> None:
        use_threads_of_torch()
        self._num_at_once = num_at_once
        self._weight_VD = weight_VD
        self._w8_VD, self._w_steps_V = _rounded(weight_VD.contiguous())
        self._slopes_VN = torch.empty(len(weight_VD), num_positions, dtype=torch.bfloat16)
        self._shares8_VN = torch.empty(len(weight_VD), num_positions, dtype=torch.int8)

    def nats_and_gradient(self, h_ND: Tensor, targets_N: Tensor, real_N: Tensor) -> tuple[Tensor, Tensor]:
        """Nats, float32 [N], of targets, and their gradients of h, float32 [N, D]; both are zero for a target that is
        not real.
        """
        h8_ND, h_steps_N = _rounded(h_ND.contiguous())
        nats_N, steps_N = torch.empty(len(h_ND)), torch.empty(len(h_ND))
        for first in range(0, len(h_ND), self._num_at_once):
            some = slice(first, first + self._num_at_once)
            sums_VN = multiply_int8(self._w8_VD, h8_ND[some].T)
            read = sums_VN, sums_VN.view(torch.float32), self._w_steps_V, h_steps_N[some], targets_N[some], real_N[some]
            written = nats_N[some], self._slopes_VN, self._shares8_VN, steps_N[some]
            compiled_training.nats_and_slopes(*_arrays(*read, *written), first)
        self._h8_ND, self._h_steps_N = h8_ND, h_steps_N
        sums_DN = multiply_int8(self._w8_VD.T, self._shares8_VN[:, : len(h_ND)])
        of_h_ND = sums_DN.T * steps_N[:, None]
        return nats_N, of_h_ND.sub_(self._weight_VD[targets_N] * real_N[:, None])

    def add_gradient(
        self, of_weight_VD: Tensor, h_ND: Tensor, weights_N: Tensor | None, targets_N: Tensor, real_N: Tensor
    ) -> None:
        """Adds the gradient that the slopes of the last positions give the read-out, times `weights`."""
        weights_N = real_N.float() if weights_N is None else real_N * weights_N
        shares8_VN = self._shares8_VN.view(-1)[: len(of_weight_VD) * len(h_ND)].view(len(of_weight_VD), len(h_ND))
        steps_V = torch.empty(len(of_weight_VD))
        asked_N = targets_N.masked_fill(~real_N, -1).int()
        tensors = self._slopes_VN, asked_N, weights_N * self._h_steps_N, shares8_VN, steps_V
        compiled_training.round_shares(*_arrays(*tensors))
        for some, sums in _products(shares8_VN, self._h8_ND):
            compiled_training.add_sums(*_arrays(sums, steps_V[some], of_weight_VD[some]))
        of_weight_VD.index_add_(0, targets_N, h_ND.float() * weights_N[:, None], alpha=-1)


def _rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of activations, bfloat16 or float32, or of weights, as multiples int8 [N, I] of steps [N]."""
    multiples_NI, steps_N = torch.empty(x_NI.shape, dtype=torch.int8), torch.empty(len(x_NI))
    rows = as_array(x_NI.detach()) if x_NI.dtype == torch.bfloat16 else as_array_of_weights(x_NI)
    compiled_training.round_rows(rows, *_arrays(multiples_NI, steps_N))
    return multiples_NI, steps_N


def _multiply(
    a_NI: Tensor,
    b_IO: Tensor,
    row_steps_N: Tensor,
    column_steps_O: Tensor | None,
    y_NO: Tensor,
    before_NO: Tensor | None = None,
) -> None:
    """Products of multiples, scaled by their steps, are written to `y`, bfloat16 or float32; see
    `compiled_training.scale_sums`.
    """
    for some, sums in _products(a_NI, b_IO):
        y, steps, before = y_NO[some], row_steps_N[some], None if before_NO is None else before_NO[some]
        if y.dtype == torch.float32:
            compiled_training.scale_rows(*_arrays(sums, steps, y))
        else:
            compiled_training.scale_sums(*_arrays(sums, steps, column_steps_O, before, y))


def _products(a_NI: Tensor, b_IO: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the product of multiples, int32 [.., O], and the rows that they are; each overwrites the one before."""
    num_parts = -(-a_NI.shape[0] * b_IO.shape[1] // _SUMS_AT_ONCE)
    # Of equal size, in whole tiles: what is left over would be slower.
    num_rows = -(-len(a_NI) // (max(1, num_parts) * _TILE)) * _TILE
    sums = torch.empty(min(num_rows, len(a_NI)), b_IO.shape[1], dtype=torch.int32)
    for start in range(0, len(a_NI), num_rows):
        some = slice(start, start + num_rows)
        yield some, multiply_int8(a_NI[some], b_IO, out=sums[: len(a_NI[some])])


def _arrays(*tensors: Tensor | None) -> Any:
    return tuple(None if tensor is None else as_array(tensor) for tensor in tensors)
