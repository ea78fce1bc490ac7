"""RMSNorm in training, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retro_ray.model.rms_norm import RMSNorm, normalise


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 7), (0, 4), (1, 1)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = (kind(shape[-1], eps=1e-3, dtype=torch.float64) for kind in (RMSNorm, nn.RMSNorm))
    results = []
    for norm in (ours, theirs):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        y = norm(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, norm.weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_weight() -> None:
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    results = [normalise(x, 1e-3), F.rms_norm(x, (6,), eps=1e-3)]
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(4, 32), (2, 100, 48), (0, 8), (65, 1)])
def test_under_autocast_the_result_is_rounded_once(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(shape, requires_grad=True), RMSNorm(shape[-1], eps=1e-5)
    nn.init.normal_(norm.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    exact = F.rms_norm(x.double(), shape[-1:], norm.weight.double(), norm.eps)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
    slopes = torch.randn(shape).bfloat16()
    ours = torch.autograd.grad(y, (x, norm.weight), slopes)
    theirs = torch.autograd.grad(exact, (x, norm.weight), slopes.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
