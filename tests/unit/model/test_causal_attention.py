"""Causal attention in blocks of queries, against the textbook's formula."""

import pytest
import torch

from retro_ray.model import attention_kernels, causal_attention
from retro_ray.model.attention_kernels import attend, attention_weights


@pytest.mark.parametrize("num_tokens", [1, 4, 11])
@pytest.mark.parametrize("kind", ["causal", "one mask", "a mask each"])
def test_values_and_gradients_are_those_of_a_masked_softmax(num_tokens, kind, monkeypatch) -> None:
    monkeypatch.setattr(causal_attention, "_BLOCK", 4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    mask = None
    if kind != "causal":
        documents = torch.randint(0, 3, (1 if kind == "one mask" else 2, num_tokens))
        mask = allowed = (allowed & (documents[:, :, None] == documents[:, None]))[:, None]
    results = [causal_attention.causal_attention(q, k, v, mask), attention_weights(q, k, allowed) @ v]
    gradients = [torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in results]
    for ours, theirs in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["causal", "one mask", "a mask each"])
def test_in_bfloat16_it_is_near_that_of_float64(kind) -> None:
    """Of more than one block, and scores of every size."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 300, 16) for _ in range(3))
    q = (q * torch.logspace(-1, 1, 300)[:, None]).bfloat16().requires_grad_()
    k, v = (x.bfloat16().requires_grad_() for x in (k, v))
    allowed, mask = torch.ones(300, 300, dtype=torch.bool).tril(), None
    if kind != "causal":
        documents = torch.randint(0, 3, (1 if kind == "one mask" else 2, 300)).sort(-1).values
        mask = allowed = (allowed & (documents[:, :, None] == documents[:, None]))[:, None]
    ours = causal_attention.causal_attention(q, k, v, mask)
    theirs = attention_weights(q.double(), k.double(), allowed) @ v.double()
    slopes = torch.randn(ours.shape).bfloat16()
    of_ours, of_theirs = (torch.autograd.grad(out, (q, k, v), slopes.to(out.dtype)) for out in (ours, theirs))
    for a, b in zip((ours, *of_ours), (theirs, *of_theirs), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_in_bfloat16_nothing_at_all_comes_from_keys_that_are_not_seen(masked) -> None:
    """Not even the smallest number: gradients there are zeros."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 16).bfloat16().requires_grad_() for _ in range(3))
    allowed, mask = torch.ones(20, 20, dtype=torch.bool).tril(), None
    if masked:
        allowed[10:, :10] = False
        mask = allowed[None, None]
    out = causal_attention.causal_attention(q, k, v, mask)
    _, of_k, of_v = torch.autograd.grad(out[:, :, 9].float().sum() * 1e30, (q, k, v))
    for slopes in (of_k, of_v):
        assert slopes[:, :, :10].any()
        assert not slopes[:, :, 10:].any()
    [of_v] = torch.autograd.grad(causal_attention.causal_attention(q, k, v, mask)[:, :, 10].float().sum() * 1e30, v)
    assert of_v[:, :, :10].any() != masked


def test_training_uses_it_and_heads_may_share_keys(monkeypatch) -> None:
    monkeypatch.setattr(causal_attention, "_BLOCK", 4)
    torch.manual_seed(0)
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    in_blocks = attend(q, k, v, causal=True)
    assert "CausalAttention" in str(in_blocks.grad_fn) or "CausalAttention" in str(in_blocks.grad_fn.next_functions)
    monkeypatch.setattr(attention_kernels, "_TRAINED_MAX_POSITIONS", 0)
    plain = attend(q, k, v, causal=True)
    torch.testing.assert_close(in_blocks, plain)
    of_both = (torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (in_blocks, plain))
    for ours, theirs in zip(*of_both, strict=True):
        torch.testing.assert_close(ours, theirs)
