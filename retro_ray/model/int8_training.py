"""Linear layers in training on a CPU whose fastest products are of eight bits.

All three products of a linear layer, y = x W^T and the gradients of x and W, multiply whole numbers and add them up in
32 bits, twice as fast as bf16 where a CPU has instructions for that and none for matrices (AVX-512 VNNI without AMX).
Rows of x and of W become multiples of a 127th of their largest component. A step belongs to a row that is added up, so
that sums can be scaled afterwards; where rows meet in the sum of a product (those of W in the gradient of x, those of x
in that of W) their steps are multiplied to the slopes, before these are rounded: by rows for the one, by columns for the
other. As Wortsman et al. 2023 do for the first two products; the third is left in 16 bits there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retro_ray.model import compiled_training
from retro_ray.model.compiled_loops import LARGEST_MULTIPLE, SMALLEST_STEP, as_array, use_threads_of_torch

_SUMS_AT_ONCE = 1 << 22
"""int32, 16 MiB: they are to be in the caches still when they are scaled."""
_LEAST_ROWS = 256
_LEAST_WIDTH = 384
"""Of smaller products bf16 is as fast."""


def is_worthwhile(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether to train this product in eight bits."""
    num_rows = x.numel() // x.shape[-1]
    enough = num_rows >= _LEAST_ROWS and min(weight_OI.shape) >= _LEAST_WIDTH
    return enough and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")


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
        largest = torch.empty(compiled_training.num_blocks(len(slopes_NO)), slopes_NO.shape[1])
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
            column_steps_O = largest.amax(0).div_(LARGEST_MULTIPLE).clamp_min_(SMALLEST_STEP)
            by_columns_NO = by_rows_NO  # no longer needed
            compiled_training.round_slopes_by_columns(
                *_arrays(slopes_NO if kept_NO is None else kept_NO, x_steps_N, 1 / column_steps_O, by_columns_NO)
            )
            of_weight_OI = torch.empty(w8_OI.shape)
            _multiply(by_columns_NO.T, x8_NI, column_steps_O, None, of_weight_OI)
        return of_x, of_weight_OI, None


class Int8ReadOut:
    """Logits of eight-bit products on the way to their slopes: those of a part of the positions at a time.

    Args:
        weight_VD: float32, the read-out.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        use_threads_of_torch()
        self._w8_VD, self._steps_V = _rounded(weight_VD.contiguous())

    def nats_and_slopes(self, h_ND: Tensor, targets_N: Tensor, real_N: Tensor, slopes_VN: Tensor, first: int) -> Tensor:
        """Nats, float32 [N], of targets; their slopes, softmax - one-hot, are written to columns from `first` on.
        Both are zero for a target that is not real.
        """
        h8_ND, h_steps_N = _rounded(h_ND.contiguous())
        sums_VN = torch._int_mm(self._w8_VD, h8_ND.T)
        nats_N = torch.empty(len(h_ND))
        tensors = sums_VN, sums_VN.view(torch.float32), self._steps_V, h_steps_N, targets_N, real_N, nats_N, slopes_VN
        compiled_training.nats_and_slopes(*_arrays(*tensors), first)
        return nats_N


def _rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, bfloat16 or float32, as multiples int8 [N, I] of steps [N]."""
    multiples_NI, steps_N = torch.empty(x_NI.shape, dtype=torch.int8), torch.empty(len(x_NI))
    compiled_training.round_rows(*_arrays(x_NI.detach(), multiples_NI, steps_N))
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
    num_rows = max(1, _SUMS_AT_ONCE // y_NO.shape[1])
    sums = torch.empty(min(num_rows, len(y_NO)), y_NO.shape[1], dtype=torch.int32)
    for start in range(0, len(y_NO), num_rows):
        some = slice(start, start + num_rows)
        y, steps, before = y_NO[some], row_steps_N[some], None if before_NO is None else before_NO[some]
        torch._int_mm(a_NI[some], b_IO, out=sums[: len(y)])
        if y.dtype == torch.float32:
            compiled_training.scale_rows(*_arrays(sums[: len(y)], steps, y))
        else:
            compiled_training.scale_sums(*_arrays(sums[: len(y)], steps, column_steps_O, before, y))


def _arrays(*tensors: Tensor | None) -> Any:
    return tuple(None if tensor is None else as_array(tensor) for tensor in tensors)
