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


def test_under_autocast_the_result_is_rounded_once() -> None:
    x, norm = torch.randn(4, 32, requires_grad=True), RMSNorm(32, eps=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert torch.equal(y, nn.functional.rms_norm(x, (32,), norm.weight, norm.eps).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == norm.weight.grad.dtype == torch.float32
