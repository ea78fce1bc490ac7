"""Keys and values as a cache holds them."""

import pytest
import torch

from retro_ray.model.cached_rows import CachedRows

CPU = torch.device("cpu")
IN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])


def written(shape: tuple[int, ...], rows: torch.Tensor, slots: list[int], dtype: torch.dtype) -> CachedRows:
    cached = CachedRows.zeros(*shape, device=CPU, dtype=dtype)
    cached.write(torch.tensor(slots), rows)
    return cached


def values_of(cached: CachedRows) -> torch.Tensor:
    return cached.of.double() if cached.steps is None else cached.of.double() * cached.steps.double()[..., None]


@IN_BITS
def test_rows_come_back_as_they_were_but_for_rounding(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 5)[:, None]
    held = values_of(written((4, 3, 8, 16), rows, [3, 1], dtype))
    largest = rows.abs().amax(-1, keepdim=True).double()
    # Half a step of eight bits; half a unit in the last place of bfloat16.
    assert ((held[[3, 1], :, :5] - rows.double()).abs() <= largest * (0.501 / 127)).all()
    assert not held[[0, 2]].any()
    assert not held[:, :, 5:].any()


def test_a_row_of_zeros_stays_one() -> None:
    assert not values_of(written((1, 1, 2, 4), torch.zeros(1, 1, 2, 4), [0], torch.int8)).any()


@IN_BITS
def test_slots_are_moved_cleared_and_resized(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    cached = written((3, 2, 6, 8), rows, [0, 1, 2], dtype)
    before = values_of(cached)
    cached.move(2, 0, 4)
    expected = before.clone()
    expected[0, :, :4] = before[2, :, :4]
    assert torch.equal(values_of(cached), expected)
    larger = cached.resized(4, 7)
    assert larger.shape == (4, 2, 7, 8)
    assert torch.equal(values_of(larger)[:3, :, :6], expected)
    assert not values_of(larger)[3].any()
    assert not values_of(larger)[:, :, 6].any()
    assert torch.equal(values_of(larger.resized(2, 5)), expected[:2, :, :5])
    cached.clear(torch.tensor([1]))
    expected[1] = 0
    assert torch.equal(values_of(cached), expected)


def test_a_row_is_rounded_to_the_same_whatever_is_beside_it() -> None:
    rows = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(2))
    together = written((2, 2, 9, 16), rows, [0, 1], torch.int8)
    alone = written((1, 2, 9, 16), rows[1:], [0], torch.int8)
    assert torch.equal(values_of(together)[1], values_of(alone)[0])
