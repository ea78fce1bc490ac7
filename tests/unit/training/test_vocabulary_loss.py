from functools import partial

import pytest
import torch
import torch.nn.functional as F

from retro_ray.model import int8_training
from retro_ray.model.pointer import DecoderOutput, Pointed
from retro_ray.training import vocabulary_loss as module
from retro_ray.training.vocabulary_loss import vocabulary_loss

N, D, V = 37, 8, 50


@pytest.fixture(autouse=True, params=[(1, 1), (7, 1), (7, 17), (1000, 1000)], ids=str)
def positions_at_once(request, monkeypatch):
    logits, slopes = request.param
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", {"cpu": logits * V})
    monkeypatch.setattr(module, "_SLOPES_AT_ONCE", slopes * V)


@pytest.fixture(params=["eager", "compiled"])
def loss(request, monkeypatch):
    """Its own code, and what is compiled on a GPU, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(module, "_TILE", 1)  # so that parts can be as small
    module._fused_nats_and_slopes.cache_clear()
    yield partial(vocabulary_loss, compiled=request.param == "compiled")
    module._fused_nats_and_slopes.cache_clear()


def inputs(dtype=torch.float64, scale: float = 1.0):
    torch.manual_seed(0)
    h = (scale * torch.randn(N, D, dtype=dtype)).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    return h, weight, torch.randint(0, V, (N,))


def reference(h, weight, targets):
    return F.cross_entropy(
        F.linear(h, weight).float() if h.dtype != torch.float64 else h @ weight.T, targets, reduction="sum"
    )


def test_loss_and_gradients_are_those_of_cross_entropy(loss):
    h, weight, targets = inputs()
    ours, theirs = loss(DecoderOutput(h), weight, targets)[0], reference(h, weight, targets)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (h, weight)), torch.autograd.grad(3 * theirs, (h, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_with_a_pointer_it_is_the_cross_entropy_of_the_mixture(loss):
    """Tokens of which some are pointed at twice, some positions that point at nothing."""
    h, weight, targets = inputs()
    tokens_CS, chunks = torch.randint(0, V, (3, 40)), torch.randint(0, 3, (N,))
    scores = torch.randn(N, 41, dtype=torch.float64, requires_grad=True)
    nothing = torch.arange(N) % 5 == 0

    def output() -> DecoderOutput:
        log_shares = scores.masked_fill(nothing[:, None] & (torch.arange(41) > 0), -1e300).log_softmax(-1)
        return DecoderOutput(h, Pointed(log_shares[:, 1:].exp(), log_shares[:, 0], chunks, tokens_CS))

    ours, nats = loss(output(), weight, targets)
    pointed = output().pointed
    theirs = F.cross_entropy(pointed.mixed_with(h @ weight.T), targets, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(nats, ours)
    given = [pointed.shares[n][tokens_CS[chunks[n]] == targets[n]].sum() for n in range(N)]
    probability = pointed.log_kept.exp() * (h @ weight.T).softmax(-1)[torch.arange(N), targets] + torch.stack(given)
    torch.testing.assert_close(ours, -probability.log().sum())
    inside = (h, weight, scores)
    for a, b in zip(torch.autograd.grad(2 * ours, inside), torch.autograd.grad(2 * theirs, inside), strict=True):
        torch.testing.assert_close(a, b)

    # A share of the plain loss beside it: nats stay those of the mixture.
    theirs = F.cross_entropy(output().pointed.mixed_with(h @ weight.T), targets, reduction="sum")
    both, nats = loss(output(), weight, targets, plain_share=0.3)
    assert torch.equal(nats, ours)
    assert not nats.requires_grad
    expected = 0.7 * theirs + 0.3 * reference(h, weight, targets)
    torch.testing.assert_close(both, expected)
    for a, b in zip(torch.autograd.grad(2 * both, inside), torch.autograd.grad(2 * expected, inside), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_read_out_changes_nothing_else(loss):
    h, weight, targets = inputs()
    [expected] = torch.autograd.grad(loss(DecoderOutput(h), weight, targets)[0], h)
    weight.requires_grad_(False)
    loss(DecoderOutput(h), weight, targets)[0].backward()
    assert weight.grad is None
    assert torch.equal(h.grad, expected)


def test_large_logits_do_not_overflow(loss):
    h, weight, targets = inputs(torch.float32, scale=1e4)
    ours = loss(DecoderOutput(h), weight, targets)[0]
    assert ours.isfinite()
    torch.testing.assert_close(ours, reference(h, weight, targets), rtol=1e-5, atol=1e-2)


def test_under_autocast_the_products_are_bf16_and_the_sums_fp32(loss):
    h, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(DecoderOutput(h), weight, targets)[0]
        theirs = reference(h, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(ours, (h, weight))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    for a, b in zip(gradients, torch.autograd.grad(theirs, (h, weight)), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("plain_share", [0.0, 0.3])
def test_in_eight_bits_it_is_near_that_of_float64(monkeypatch, plain_share):
    """With some positions that point at tokens, and some without a target."""
    monkeypatch.setattr(int8_training, "_LEAST_ROWS", 1)
    monkeypatch.setattr(int8_training, "LEAST_INT8_WIDTH", 1)
    h, weight, targets = inputs(torch.float32)
    tokens_CS, chunks = torch.randint(0, V, (3, 40)), torch.randint(0, 3, (N,))
    scores = torch.randn(N, 41, requires_grad=True)
    targets[::9] = -1
    results = []
    for dtype, in_int8 in ((torch.float64, False), (torch.float32, True)):
        log_shares = scores.to(dtype).log_softmax(-1)
        output = DecoderOutput(h.to(dtype), Pointed(log_shares[:, 1:].exp(), log_shares[:, 0], chunks, tokens_CS))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_int8):
            loss, _ = vocabulary_loss(output, weight.to(dtype), targets, plain_share, in_int8=in_int8)
        results.append((loss, *torch.autograd.grad(loss, (h, weight, scores))))
    for exact, ours in zip(*results, strict=True):
        assert not torch.equal(ours, exact.float())
        assert (ours - exact).norm() < 0.03 * exact.norm()


def test_in_eight_bits_a_frozen_read_out_gets_no_gradient(monkeypatch):
    monkeypatch.setattr(int8_training, "_LEAST_ROWS", 1)
    monkeypatch.setattr(int8_training, "LEAST_INT8_WIDTH", 1)
    h, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [expected] = torch.autograd.grad(vocabulary_loss(DecoderOutput(h), weight, targets, in_int8=True)[0], h)
        weight.requires_grad_(False)
        vocabulary_loss(DecoderOutput(h), weight, targets, in_int8=True)[0].backward()
    assert weight.grad is None
    assert torch.equal(h.grad, expected)


def test_no_positions_have_no_loss(loss):
    h, weight, targets = inputs()
    ours = loss(DecoderOutput(h[:0]), weight, targets[:0])[0]
    ours.backward()
    assert ours.item() == 0
    assert not weight.grad.any()


def test_what_is_no_target_counts_for_nothing(loss):
    h, weight, targets = inputs()
    tokens_CS, chunks = torch.randint(0, V, (3, 40)), torch.randint(0, 3, (N,))
    scores = torch.randn(N, 41, dtype=torch.float64, requires_grad=True)
    shares, log_kept = scores.softmax(-1)[:, 1:], scores.log_softmax(-1)[:, 0]
    output, inside = DecoderOutput(h, Pointed(shares, log_kept, chunks, tokens_CS)), (h, weight, scores)
    asked = torch.arange(N) % 3 != 0
    both, nats = loss(output, weight, targets.masked_fill(~asked, -100), plain_share=0.3)
    expected, expected_nats = loss(output[asked], weight, targets[asked], plain_share=0.3)
    torch.testing.assert_close((both, nats), (expected, expected_nats))
    theirs = torch.autograd.grad(expected, inside, retain_graph=True)
    for a, b in zip(torch.autograd.grad(both, inside), theirs, strict=True):
        torch.testing.assert_close(a, b)
