"""Linear layers that are trained in products of eight bits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from retro_ray.model import int8_training
from retro_ray.model.compiled_loops import LARGEST_MULTIPLE
from retro_ray.model.compiled_training import LARGEST_SLOPE
from retro_ray.model.int8_training import Int8ReadOut, int8_product, is_worthwhile
from retro_ray.model.layers import FeedForward, GatedFeedForward, Linear, gelu_of, joint_product

ROUNDED = 0.03
"""Of a result's norm, what rounding to a 127th of the largest of some hundred normal numbers may do, twice."""


def whole_numbers(size: int, largest: int, seed: int) -> Tensor:
    """From -9 to 9, but the largest or its negative once in each row and column, so that a step is 1 for both."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-9, 10, (size, size), generator=generator).float()
    signs = 2 * torch.randint(0, 2, (size,), generator=generator) - 1
    numbers[torch.arange(size), torch.randperm(size, generator=generator)] = largest * signs.float()
    return numbers


@given(size=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_of_what_eight_bits_can_hold_all_three_products_are_exact(size: int, seed: int) -> None:
    x, weight = (whole_numbers(size, LARGEST_MULTIPLE, seed + number) for number in range(2))
    slopes = whole_numbers(size, LARGEST_SLOPE, seed + 2)
    x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
    y = int8_product(x, weight)
    assert torch.equal(y, (x.double() @ weight.double().T).bfloat16())
    of_x, of_weight = torch.autograd.grad(y, (x, weight), slopes.bfloat16())
    assert torch.equal(of_x, (slopes.double() @ weight.double()).bfloat16())
    torch.testing.assert_close(of_weight, (slopes.double().T @ x.double()).float(), rtol=1e-6, atol=1e-5)


def product_and_gradients(x: Tensor, weight: Tensor, slopes: Tensor, gelu: bool, int8: bool) -> tuple[Tensor, ...]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if int8:
        y = int8_product(x, weight, gelu)
    else:
        y = x.double() @ weight.double().T
        y = F.gelu(y) if gelu else y
    return y.detach(), *torch.autograd.grad(y, (x, weight), slopes.to(y.dtype))


@given(
    shape=st.sampled_from([(300,), (2, 150), (1, 3, 100)]),
    widths=st.sampled_from([(384, 400), (130, 64)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    gelu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_others_are_near_those_of_float64(
    shape: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, gelu: bool, seed: int
) -> None:
    """Rows of unlike size, as tokens have them, in activations and slopes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(*shape, 1, generator=generator) + 0.1
    x = (torch.randn(*shape, widths[0], generator=generator) * sizes).to(dtype)
    weight = torch.randn(widths[1], widths[0], generator=generator) / widths[0] ** 0.5
    slopes = torch.randn(*shape, widths[1], generator=generator) * sizes.flip(-2)
    ours = product_and_gradients(x, weight, slopes, gelu, int8=True)
    theirs = product_and_gradients(x, weight, slopes, gelu, int8=False)
    assert [result.dtype for result in ours] == [torch.bfloat16, dtype, torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < ROUNDED * b.norm()


@given(power=st.integers(-40, 20), seed=st.integers(0, 2**16))
def test_how_large_a_row_is_does_not_matter(power: int, seed: int) -> None:
    """A step is the row's own: a token of small activations is as exact as another."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(5, 16, generator=generator) for _ in range(2))
    larger = x.clone()
    larger[2] *= 2.0**power
    y, scaled = int8_product(x, weight), int8_product(larger, weight)
    assert torch.equal(scaled[2], y[2] * 2.0**power)
    assert torch.equal(scaled[[0, 1, 3, 4]], y[[0, 1, 3, 4]])


@given(power=st.integers(-40, 20), gelu=st.booleans(), seed=st.integers(0, 2**16))
def test_how_large_all_slopes_are_does_not_matter(power: int, gelu: bool, seed: int) -> None:
    """They are divided by a batch's number of targets, which may be a million."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, slopes = (torch.randn(5, 16, generator=generator) for _ in range(3))
    slopes = slopes[:, :5] @ torch.ones(5, 5)
    _, *gradients = product_and_gradients(x, weight, slopes, gelu, int8=True)
    _, *scaled = product_and_gradients(x, weight, slopes * 2.0**power, gelu, int8=True)
    for a, b in zip(scaled, gradients, strict=True):
        assert torch.equal(a, b * 2.0**power)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_rounded_away(bad: float) -> None:
    """A run that diverges must be seen to."""
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    spoilt = x.detach().clone()
    spoilt[1, 3] = bad
    y = int8_product(spoilt, weight)
    assert not y[1].isfinite().any()
    assert y[[0, 2, 3]].isfinite().all()
    slopes = torch.ones(4, 8)
    slopes[2, 5] = bad
    of_x, of_weight = torch.autograd.grad(int8_product(x, weight), (x, weight), slopes)
    assert not of_x[2].isfinite().any()
    assert of_x[[0, 1, 3]].isfinite().all()
    assert not of_weight[5].isfinite().any()


def test_rows_of_zeros_are_zeros() -> None:
    x, weight = torch.zeros(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    y = int8_product(x, weight)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), torch.zeros_like(y))
    for result in (y, of_x, of_weight):
        assert not result.any()


def test_of_frozen_weights_only_activations_get_gradients() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16)
    int8_product(x, weight).sum().backward()
    assert x.grad.any()
    assert weight.grad is None


def test_sums_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, slopes = torch.randn(50, 16), torch.randn(24, 16), torch.randn(50, 24)
    whole = product_and_gradients(x, weight, slopes, gelu=True, int8=True)
    monkeypatch.setattr(int8_training, "_SUMS_AT_ONCE", 7 * 24)
    for a, b in zip(product_and_gradients(x, weight, slopes, gelu=True, int8=True), whole, strict=True):
        assert torch.equal(a, b)


def test_small_products_and_those_without_gradients_are_left_alone() -> None:
    large, weight = torch.randn(256, 384), torch.randn(384, 384)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_worthwhile(large, weight)
        assert not is_worthwhile(large[:255], weight)
        assert not is_worthwhile(large, weight[:383])
        with torch.no_grad():
            assert not is_worthwhile(large, weight)
    assert not is_worthwhile(large, weight)


def trained_in_int8(*linears: torch.nn.Module) -> None:
    for linear in linears:
        linear.trains_in_int8 = True


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_read_the_same_are_one_product(bias: bool) -> None:
    torch.manual_seed(0)
    linears = [Linear(384, width, bias=bias) for width in (384, 512)]
    x, slopes = torch.randn(300, 384), [torch.randn(300, width) for width in (384, 512)]

    def results() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ys = joint_product(linears, x)
        weights = [weight for linear in linears for weight in linear.parameters()]
        return [*ys, *torch.autograd.grad(ys, weights, [slope.bfloat16() for slope in slopes])]

    in_bf16 = results()
    trained_in_int8(*linears)
    for a, b in zip(results(), in_bf16, strict=True):
        assert a.dtype == b.dtype
        assert not torch.equal(a, b) or a.dim() == 1  # the gradient of a bias is no product
        assert (a - b).norm() < ROUNDED * b.norm()


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_a_feed_forward_block_is_near_what_it_is_in_bf16(kind: type[FeedForward]) -> None:
    torch.manual_seed(0)
    block, h = kind(384, 768, 1e-5), torch.randn(2, 160, 384, requires_grad=True)
    block.initialise(1)

    def results() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(h) - h
        return y, *torch.autograd.grad(y.sin().sum(), (h, *block.parameters()))

    in_bf16 = results()
    trained_in_int8(*(module for module in block.modules() if isinstance(module, Linear)))
    for a, b in zip(results(), in_bf16, strict=True):
        assert not torch.equal(a, b)
        assert (a - b).norm() < 1.5 * ROUNDED * b.norm()


def test_gelu_of_a_layer_with_a_bias_is_of_both() -> None:
    torch.manual_seed(0)
    linear, x = Linear(384, 384, bias=True), torch.randn(300, 384)
    trained_in_int8(linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gelu_of(linear, x)
    expected = F.gelu(F.linear(x, linear.weight, linear.bias))
    assert (y - expected).norm() < ROUNDED * expected.norm()


@given(
    num_parts=st.integers(1, 3),
    num_at_once=st.sampled_from([1, 65, 200]),
    scale=st.sampled_from([0.3, 3.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_read_outs_nats_and_gradients_are_near_those_of_cross_entropy(
    num_parts: int, num_at_once: int, scale: float, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab_size, dim, num_positions = 500, 128, 150
    weight = (torch.randn(vocab_size, dim, generator=generator) / dim**0.5).requires_grad_()
    h = (scale * torch.randn(num_positions, dim, generator=generator)).bfloat16().float().requires_grad_()
    targets = torch.randint(0, vocab_size, (num_positions,), generator=generator)
    real = torch.rand(num_positions, generator=generator) < 0.9
    weights = torch.rand(num_positions, generator=generator) if weighted else None

    size = -(-num_positions // num_parts)
    read_out, of_weight = Int8ReadOut(weight.detach(), size, num_at_once), torch.zeros_like(weight)
    nats, of_h = [], []
    for start in range(0, num_positions, size):
        part = slice(start, start + size)
        h_part = h.detach()[part].bfloat16()
        results = read_out.nats_and_gradient(h_part, targets[part], real[part])
        nats.append(results[0])
        of_h.append(results[1])
        of_part = None if weights is None else weights[part]
        read_out.add_gradient(of_weight, h_part, of_part, targets[part], real[part])

    expected = F.cross_entropy(h.double() @ weight.double().T, targets, reduction="none") * real
    torch.testing.assert_close(torch.cat(nats).double(), expected.detach(), atol=0.05 * scale, rtol=0.01)
    [expected_of_h] = torch.autograd.grad(expected.sum(), h, retain_graph=True)
    assert (torch.cat(of_h) - expected_of_h).norm() < ROUNDED * expected_of_h.norm()
    assert not torch.cat(of_h)[~real].any()
    [expected_of_weight] = torch.autograd.grad((expected * (1 if weights is None else weights)).sum(), weight)
    assert (of_weight - expected_of_weight).norm() < ROUNDED * expected_of_weight.norm()


def test_many_small_slopes_of_one_sign_are_not_lost_beside_a_large_one() -> None:
    """Each is less than half a step, and together they are most of the gradient of the weights."""
    x, weight = torch.ones(640, 16), torch.ones(8, 16, requires_grad=True)
    slopes = torch.full((640, 8), 0.003)
    slopes[100] = 1.0
    [of_weight] = torch.autograd.grad(int8_product(x, weight), weight, slopes.bfloat16())
    torch.testing.assert_close(of_weight, torch.full((8, 16), 1 + 639 * 0.003), rtol=0.03, atol=0)


def test_many_small_shares_are_not_lost_beside_a_large_one() -> None:
    """Of 4,000 tokens one has half of the softmax, and the others, which all pull one way, share the other half."""
    vocab_size, dim = 4000, 64
    weight, h = torch.zeros(vocab_size, dim), torch.zeros(1, dim)
    weight[:, 0], h[0, 1], weight[5, 1] = 1.0, 1.0, 8.3
    read_out, target = Int8ReadOut(weight, 1, 1), torch.tensor([9])
    _, of_h = read_out.nats_and_gradient(h.bfloat16(), target, torch.tensor([True]))
    share = (h @ weight.T).softmax(-1)[0, 5]
    assert 0.4 < share < 0.6
    # The sum of all shares times 1, less the target's 1, is 0; without the small ones it would be -0.5.
    assert of_h[0, 0].abs() < 0.02
    torch.testing.assert_close(of_h[0, 1], share * 8.3, rtol=0.02, atol=0)


def test_tokens_that_are_targets_are_pushed_down_elsewhere_as_much_as_in_float64() -> None:
    """Their shares at other positions are small beside a target's slope, and many."""
    vocab_size, dim, num_positions = 2000, 64, 512
    weight, h = torch.zeros(vocab_size, dim), torch.ones(num_positions, dim)
    read_out, of_weight = Int8ReadOut(weight, num_positions, 64), torch.zeros(vocab_size, dim)
    targets, real = torch.zeros(num_positions, dtype=torch.int64), torch.arange(num_positions) == 0
    targets[0] = 7
    real[:] = True
    targets[1:] = 8
    read_out.nats_and_gradient(h.bfloat16(), targets, real)
    read_out.add_gradient(of_weight, h.bfloat16(), None, targets, real)
    # All tokens have the share 1 / V at each position; 7 is the target of one.
    torch.testing.assert_close(of_weight[7], torch.full((dim,), num_positions / vocab_size - 1), rtol=1e-2, atol=0)
    torch.testing.assert_close(of_weight[9], torch.full((dim,), num_positions / vocab_size), rtol=1e-2, atol=0)
