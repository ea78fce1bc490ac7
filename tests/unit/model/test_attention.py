"""The attention kernel and the rotary positions."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from retro_ray.model import attention_kernels
from retro_ray.model.attention_kernels import attend, causal_within, open_empty_rows
from retro_ray.model.layers import rotary_at, rotate


def random_qkv(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    lengths = (num_queries, num_keys, num_keys)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in lengths)
    return q, k, v


@pytest.mark.parametrize("kind", ["free", "causal", "masked"])
def test_both_kernels_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(5, 5)
    mask = torch.rand(2, 1, 5, 5) < 0.5 if kind == "masked" else None
    mask = None if mask is None else open_empty_rows(mask)
    results = []
    for most_positions in (0, 100):
        monkeypatch.setattr(attention_kernels, "_PLAIN_MAX_POSITIONS", most_positions)
        out = attend(q, k, v, mask, causal=kind == "causal")
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_attend_is_the_textbook_formula() -> None:
    q, k, v = random_qkv(4, 7)
    expected = F.softmax(torch.einsum("bhte,bhse->bhts", q, k) / math.sqrt(8), dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected)


@pytest.mark.parametrize("plain_max_positions", [0, 1024], ids=["fused", "plain"])
def test_a_mask_may_be_what_is_added_to_scores(plain_max_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_PLAIN_MAX_POSITIONS", plain_max_positions)
    q, k, v = random_qkv(5, 5)
    allowed = open_empty_rows(torch.rand(2, 1, 5, 5) < 0.5)
    added = torch.where(allowed, 0.0, -math.inf).double()
    torch.testing.assert_close(attend(q, k, v, added), attend(q, k, v, allowed))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_documents_kept_apart_in_blocks_attend_as_by_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more than one block of 128, heads of keys shared; padding behind one document of three, and one alone."""
    monkeypatch.setattr(attention_kernels, "_block_mask", lambda: create_block_mask)  # compiled in training
    segments_BT = torch.zeros(2, 200, dtype=torch.int64)
    segments_BT[0, 70:], segments_BT[0, 130:], segments_BT[0, 180:] = 1, 2, -1
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 16) for heads in (2, 1, 1))
    in_blocks = causal_within(segments_BT, in_blocks=True)
    assert isinstance(in_blocks, BlockMask)
    with torch.no_grad():
        expected = attend(q, k, v, causal_within(segments_BT, in_blocks=False))
        torch.testing.assert_close(attend(q, k, v, in_blocks), expected)
    assert in_blocks.kv_num_blocks[1, 0].tolist() == [1, 2]


def test_only_empty_rows_are_opened() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    assert open_empty_rows(mask).tolist() == [[True, False], [True, True]]


def test_rotated_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(query_position: int, key_position: int) -> torch.Tensor:
        at = [rotary_at(torch.tensor([p]), 8, 10_000.0, q.dtype) for p in (query_position, key_position)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(product(3, 1), product(103, 101))
    assert not torch.isclose(product(3, 1), product(1, 3))
    torch.testing.assert_close(product(7, 7), (q * k).sum())


def test_positions_keep_their_precision_in_bfloat16() -> None:
    """In bfloat16 arithmetic 257 would be 256."""
    coarse = rotary_at(torch.tensor([256, 257]), 8, 10_000.0, torch.bfloat16)
    exact = rotary_at(torch.tensor([256, 257]), 8, 10_000.0, torch.float64)
    torch.testing.assert_close(coarse.cos.double(), exact.cos, atol=1e-4, rtol=0)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows of a head": lambda x: x.contiguous(),
    "heads of a projection": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "beside others": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "not one behind the other": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("lies", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_in_bfloat16_a_rotation_is_rounded_once_and_its_gradient_turns_back(
    lies: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Wherever numbers lie in memory."""
    torch.manual_seed(0)
    x = lies(torch.randn(2, 3, 5, 8).bfloat16()).requires_grad_()
    rotary = rotary_at(torch.arange(300, 305), 8, 10_000.0, x.dtype)
    exact = rotary_at(torch.arange(300, 305), 8, 10_000.0, torch.float64)
    slopes = lies(torch.randn(2, 3, 5, 8).bfloat16())
    y, expected = rotate(x, rotary), rotate(x.double(), exact)
    for a, b in ((y, expected), (torch.autograd.grad(y, x, slopes)[0], torch.autograd.grad(expected, x, slopes)[0])):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-8, atol=1e-3)


def test_rotation_is_the_same_in_training() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    rotary = rotary_at(torch.arange(5), 8, 10_000.0, x.dtype)
    trained = rotate(x, rotary)
    with torch.no_grad():
        plain = rotate(x, rotary)
    torch.testing.assert_close(trained, plain)
    # A rotation's transpose turns back, and no vector changes its length.
    [back] = torch.autograd.grad(trained, x, plain)
    torch.testing.assert_close(back, x)
