"""Products with weights in eight bits, for the few rows of new tokens on a CPU.

Such a product takes as long as its weights take to be read, and in eight bits they are half of what
they are in bf16. A row of weights becomes multiples of a 127th of its largest component, and so does
each row that is multiplied; sums of integers are exact, so that a row gives the same to the bit
whatever rows are beside it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_LARGEST = 127
_ZERO_POINT = 128
"""FBGEMM takes unsigned rows: this is its zero."""
_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"
_SMALLEST_STEP = 1e-12
"""So that a row of zeros has one."""


def int8_is_fast() -> bool:
    """Whether this CPU adds up products of eight bits in 32, as older instructions do not, and torch still has them in
    a form that can be used here.
    """
    has_products = (
        "fbgemm" in torch.backends.quantized.supported_engines
        and hasattr(torch, "quantize_per_channel")
        and hasattr(torch.ops.quantized, _PRODUCT)
    )
    return has_products and bool(torch.cpu.get_capabilities().get("avx512_vnni"))


class Int8Product:
    """x W^T for rows x [N, I] of any floating-point type, in float32 [N, O].

    Args:
        weight_OI: W.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        weight_OI = weight_OI.detach().float()
        steps_O = weight_OI.abs().amax(dim=1).div_(_LARGEST).clamp_min_(_SMALLEST_STEP)
        zeros_O = torch.zeros(len(steps_O), dtype=torch.int64)
        engine = torch.backends.quantized.engine
        with warnings.catch_warnings():
            # Deprecated, but FBGEMM takes its weights in no other form.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            rounded = torch.quantize_per_channel(weight_OI, steps_O.double(), zeros_O, 0, torch.qint8)
        try:
            torch.backends.quantized.engine = "fbgemm"
            self._packed = torch.ops.quantized.linear_prepack(rounded, None)
        finally:
            torch.backends.quantized.engine = engine
        self._smallest_step = torch.full((1,), _SMALLEST_STEP)
        self._multiply = getattr(torch.ops.quantized, _PRODUCT)

    def __call__(self, x_NI: Tensor) -> Tensor:
        steps_N1 = torch.add(self._smallest_step, x_NI.abs().amax(dim=1, keepdim=True), alpha=1 / _LARGEST)
        # Rounded to integers in there.
        return self._multiply(x_NI / steps_N1, 1.0, _ZERO_POINT, self._packed).mul_(steps_N1)
