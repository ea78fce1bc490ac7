"""Products with weights in eight bits, for the few rows of new tokens on a CPU.

Such a product takes as long as its weights take to be read, and in eight bits they are half of what
they are in bf16. A row of weights becomes multiples of a 127th of its largest component, and so does
each row that is multiplied; sums of integers are exact, so that a row gives the same to the bit
whatever rows are beside it.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from retro_ray.model.compiled_loops import LARGEST_MULTIPLE, SMALLEST_STEP

ZERO_POINT = 128
"""The fast kernels take unsigned rows: this is their zero."""
_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"


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


def row_steps(rows: Tensor) -> Tensor:
    """Of float32 rows [..., I], the step of each: [...]."""
    return rows.abs().amax(dim=-1).div_(LARGEST_MULTIPLE).clamp_min_(SMALLEST_STEP)


class Multiples(NamedTuple):
    """Rows, each in units of a step of its own."""

    of_NI: Tensor
    """float32, from -127 to 127; not yet whole numbers, or the results of a product with such."""
    steps_N: Tensor
    """float32."""

    @classmethod
    def empty(cls, num_rows: int, width: int) -> Multiples:
        """To be written."""
        return cls(torch.empty(num_rows, width), torch.empty(num_rows))

    def added_to(self, h_ND: Tensor) -> Tensor:
        """`h` and the rows."""
        return torch.addcmul(h_ND.float(), self.of_NI, self.steps_N[:, None])


class Int8Product:
    """x W^T for rows x [N, I].

    Args:
        weight_OI: W.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        weight_OI = weight_OI.detach().float()
        steps_O = row_steps(weight_OI)
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
        self._multiply = getattr(torch.ops.quantized, _PRODUCT)

    def of(self, x: Multiples) -> Multiples:
        """The product, float32 [N, O], in units of the same steps; x is rounded to whole numbers before."""
        return Multiples(self._multiply(x.of_NI, 1.0, ZERO_POINT, self._packed), x.steps_N)
