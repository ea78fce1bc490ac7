"""RMSNorm, on a CPU in fewer passes over memory, its backward pass in a third of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_ray.model import compiled_training
from retro_ray.model.compiled_loops import as_array, as_array_of_weights, use_threads_of_torch


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with a weight; on a CPU in fewer steps, in training and scoring, and of new tokens.

    Under autocast the result there has autocast's type at once: all who read it would convert it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.eps is None:
            return super().forward(x)
        if x.device.type == "cpu" and not has_many_rows_on_cpu(x) and (x.dim() == 2 or x.dtype != self.weight.dtype):
            return (x * _scales(x, self.eps)).mul_(self.weight).to(x.dtype)
        if not _in_own_steps(x):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        in_one_pass = dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        if in_one_pass and x.dtype == self.weight.dtype == torch.float32:
            return _RMSNormInBf16.apply(x, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps, dtype)


def normalise(x: Tensor, eps: float) -> Tensor:
    """`x` with a mean square of 1 in every row."""
    if not _in_own_steps(x):
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return _RMSNorm.apply(x, None, eps, x.dtype)


def has_many_rows_on_cpu(x: Tensor) -> bool:
    """Whether it is one of training, or of scoring under autocast; generating has few."""
    return x.device.type == "cpu" and (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def _in_own_steps(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and has_many_rows_on_cpu(x)


def _scales(x: Tensor, eps: float) -> Tensor:
    """(mean of x^2 + eps)^-1/2 of each row, [..., 1], in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = x s w with s = (mean of x^2 + eps)^-1/2 of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        rows_ND = x.reshape(-1, x.shape[-1])
        scale_N1 = _scales(rows_ND, eps)
        ctx.save_for_backward(rows_ND, scale_N1, weight)
        y_ND = rows_ND * scale_N1
        return (y_ND if weight is None else y_ND.mul_(weight)).to(dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows_ND, scale_N1, weight = ctx.saved_tensors
        slope_ND = gradients[0].reshape(rows_ND.shape).to(rows_ND.dtype)
        with torch.autocast("cpu", enabled=False):
            product_ND = slope_ND * rows_ND
            of_weight = (scale_N1.T @ product_ND)[0] if ctx.needs_input_grad[1] else None
            sum_N1 = product_ND.sum(-1, keepdim=True) if weight is None else (product_ND @ weight)[:, None]
            # x changes its own value, and s through the mean of the squares.
            share_N1 = sum_N1.mul_(scale_N1.pow(3)).div_(rows_ND.shape[1])
            of_x = slope_ND * scale_N1 if weight is None else (slope_ND * weight).mul_(scale_N1)
            of_x.addcmul_(rows_ND, share_N1, value=-1)
        return of_x.view(gradients[0].shape), of_weight, None, None


class _RMSNormInBf16(torch.autograd.Function):
    """The same of float32, with a result in bfloat16: one pass each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_ND, weight_D = x.reshape(-1, x.shape[-1]).contiguous(), as_array_of_weights(weight)
        y_ND, scales_N = torch.empty(x_ND.shape, dtype=torch.bfloat16), torch.empty(len(x_ND))
        use_threads_of_torch()
        compiled_training.rms_norm(as_array(x_ND.detach()), weight_D, eps, as_array(scales_N), as_array(y_ND))
        ctx.save_for_backward(x_ND, scales_N, weight)
        return y_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, scales_N, weight = ctx.saved_tensors
        slopes_ND = gradients[0].reshape(x_ND.shape).to(torch.bfloat16).contiguous()
        of_x_ND = torch.empty_like(x_ND)
        of_weight_BD = torch.empty(compiled_training.num_blocks(len(x_ND)), x_ND.shape[1])
        use_threads_of_torch()
        compiled_training.slopes_of_rms_norm(
            as_array(x_ND.detach()),
            as_array_of_weights(weight),
            *(as_array(tensor) for tensor in (scales_N, slopes_ND, of_x_ND, of_weight_BD)),
        )
        return of_x_ND.view(gradients[0].shape), of_weight_BD.sum(0), None
