"""Products with weights of eight bits, beside the same computed with integers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.model.int8_blocks import Int8ReadOut
from retro_ray.model.int8_product import int8_is_fast

pytestmark = pytest.mark.skipif(not int8_is_fast(), reason="this CPU adds up products of eight bits in 16")


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multiples, int64, of a 127th of each row's largest component, and that."""
    steps = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(np.divide(x, steps, out=np.zeros_like(x), where=steps > 0)).astype(np.int64), steps


@given(
    num_rows=st.integers(1, 20),
    num_in=st.integers(1, 300),
    num_out=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_sum_of_integers(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Steps that are powers of two, so that nothing but what is tested is rounded.
    weight = torch.randint(-127, 128, (num_out, num_in), generator=generator).float()
    weight[:, 0] = 127
    x = torch.rand(num_rows, num_in, generator=generator) * 254 - 127
    x[:, 0] = 127
    x = (x * 2.0 ** torch.randint(-8, 8, (num_rows, 1), generator=generator)).to(dtype)
    multiples, steps = rounded(x.double().numpy())
    expected = (multiples @ weight.long().numpy().T) * steps
    torch.testing.assert_close(Int8ReadOut(weight)(x).double(), torch.from_numpy(expected), rtol=1e-6, atol=0)


def test_it_is_close_to_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((8, 896), (512, 896)))
    error = Int8ReadOut(weight)(x) - x @ weight.T
    assert error.square().mean().sqrt() < 0.02 * 896**0.5


def test_rows_of_zeros_stay_zero() -> None:
    """Those that are multiplied, and those of the weights."""
    weight = torch.ones(3, 8)
    weight[1] = 0
    x = torch.ones(2, 8)
    x[0] = 0
    torch.testing.assert_close(Int8ReadOut(weight)(x), torch.tensor([[0.0, 0, 0], [8, 0, 8]]))
