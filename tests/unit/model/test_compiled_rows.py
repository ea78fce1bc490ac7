"""Compiled loops, beside the same computed by torch in float64."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from retro_ray.model import compiled_loops, compiled_rows
from retro_ray.model.causal_attention import refusal
from retro_ray.model.compiled_loops import as_array
from retro_ray.model.int8_product import Multiples
from retro_ray.model.row_attention import read_rows

TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def attended(q_E: Tensor, k_SE: Tensor, v_SE: Tensor) -> Tensor:
    """One head of one token, in float64."""
    scores_S = k_SE.double() @ q_E.double() / q_E.shape[-1] ** 0.5
    return scores_S.softmax(0) @ v_SE.double()


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 16, 40]),
    num_tokens=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_a_token_reads_what_a_softmax_over_its_rows_gives(
    dtype: torch.dtype, num_kv_heads: int, head_dim: int, num_tokens: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_slots, num_rows, num_heads = 3, 33, 4
    keys, values = (
        torch.randn(num_slots, num_kv_heads, num_rows, head_dim, generator=generator).to(dtype) for _ in range(2)
    )
    q_NHE = (scale * torch.randn(num_tokens, num_heads, head_dim, generator=generator)).to(dtype)
    slots_N = torch.randint(num_slots, (num_tokens,), generator=generator)
    positions_N = torch.randint(num_rows, (num_tokens,), generator=generator)
    allowed_BS = torch.rand(num_slots, 20, generator=generator) < 0.5
    allowed_BS[:, 7] = True
    past = read_rows(q_NHE, keys, values, slots_N, positions_N).unflatten(-1, (num_heads, -1))
    allowed = read_rows(q_NHE, keys, values, slots_N, positions_N, refusal(~allowed_BS, dtype))
    allowed = allowed.unflatten(-1, (num_heads, -1))
    assert past.dtype == allowed.dtype == dtype
    for n, (slot, position) in enumerate(zip(slots_N.tolist(), positions_N.tolist(), strict=True)):
        for head in range(num_heads):
            k_SE, v_SE = (store[slot, head * num_kv_heads // num_heads] for store in (keys, values))
            seen = slice(position + 1), torch.nonzero(allowed_BS[slot])[:, 0]
            for found, rows in zip((past, allowed), seen, strict=True):
                expected = attended(q_NHE[n, head], k_SE[rows], v_SE[rows])
                torch.testing.assert_close(
                    found[n, head].double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
                )


@pytest.mark.parametrize("is_gated", [False, True], ids=["gelu", "swiglu"])
def test_activations_are_those_of_torch(is_gated: bool) -> None:
    """From where both tails are zero, over zero, to where they are not."""
    steps_N = torch.tensor([0.125, 4.0])
    x_NF = torch.linspace(-12, 12, 4097).repeat(2, 2 if is_gated else 1)
    multiples = Multiples.empty(2, 4097)
    activate = compiled_rows.gated_silu if is_gated else compiled_rows.gelu
    activate(as_array(x_NF), as_array(steps_N), as_array(multiples.of_NI), as_array(multiples.steps_N))
    up_NF = (x_NF * steps_N[:, None]).double()
    expected = F.silu(up_NF[:, :4097]) * up_NF[:, 4097:] if is_gated else F.gelu(up_NF)
    found = multiples.of_NI.double() * multiples.steps_N.double()[:, None]
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-6)
    assert multiples.of_NI.abs().amax(1).tolist() == pytest.approx([127, 127])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_become_whole_multiples(dtype: torch.dtype) -> None:
    x_NI = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_NI[1] = 0
    x_NI[2] *= 1e4
    rounded_NI, steps_N = torch.empty(5, 300, dtype=torch.uint8), torch.empty(5)
    compiled_rows.round_to_bytes(as_array(x_NI), as_array(rounded_NI), as_array(steps_N))
    expected_N = 1e-12 + np.abs(x_NI.float().numpy()).max(axis=1) / 127
    np.testing.assert_allclose(steps_N.numpy(), expected_N, rtol=1e-6)
    whole = np.rint(x_NI.float().numpy() / steps_N.numpy()[:, None]).astype(int)
    assert (rounded_NI.numpy() == whole + 128).all()
    assert rounded_NI[[0, 2, 3, 4]].int().sub(128).abs().amax(1).tolist() == [127] * 4
    assert (rounded_NI[1] == 128).all()


def test_bf16_is_rounded_as_torch_does() -> None:
    """Halfway to the even one; beside the largest and the smallest numbers."""
    bits = np.arange(0x3F800000, 0x3F820000, 0x1000, dtype=np.uint32)
    x_NO = torch.from_numpy(np.concatenate([bits.view(np.float32), -bits.view(np.float32), [0, 1e-30, 1e30]])[None])
    x_NO = x_NO.float().contiguous()
    scaled = torch.empty(x_NO.shape, dtype=torch.bfloat16)
    compiled_rows.scale_rows(as_array(x_NO), as_array(torch.ones(1)), as_array(scaled))
    assert torch.equal(scaled, x_NO.bfloat16())


def test_loops_are_compiled_where_no_place_can_keep_them() -> None:
    """As in a container whose files belong to somebody else: Numba has no file here to put its code beside."""
    names: dict = {}
    exec("def double(x):\n    for i in range(len(x)):\n        x[i] *= 2\n", names)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(names["double"])
    x = np.ones(3)
    compiled_loops.compiled(parallel=False)(names["double"])(x)
    assert x.tolist() == [2, 2, 2]


def test_torch_keeps_its_number_of_threads() -> None:
    """In a process of its own, as Numba starts once: torch's threads would wait for processors that are not theirs."""
    script = """
import numba, torch
torch.set_num_threads(1)
from retro_ray.model.compiled_loops import use_threads_of_torch
use_threads_of_torch()
print(torch.get_num_threads(), numba.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "1 1\n"


def test_it_is_said_that_there_is_no_openmp(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing else would tell why half of the speed is missing."""
    monkeypatch.setattr(compiled_loops, "HAS_OPENMP", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    compiled_loops._have_openmp.cache_clear()
    try:
        for _ in range(2):
            compiled_loops.use_threads_of_torch()
    finally:
        compiled_loops._have_openmp.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "Numba finds no OpenMP here, so what it compiles runs in one thread: install libgomp1 "
        "(Debian, Ubuntu), libgomp (Fedora, RHEL) or libomp (macOS)"
    ]
