"""Blocks in eight bits, beside the model's own whose linear layers round weights and rows in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from retro_ray.model.cached_rows import CachedRows
from retro_ray.model.int8_blocks import Int8Layer
from retro_ray.model.int8_linear import Int8Linear
from retro_ray.model.int8_product import int8_is_fast
from tests.unit.model.models import LLAMA_BLOCKS, place_new_tokens, random_model, small_config

pytestmark = pytest.mark.skipif(not int8_is_fast(), reason="this CPU adds up products of eight bits in 16")

BLOCKS = pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"num_kv_heads": 2},
        {"qk_norm": True},
        {"attention_bias": True},
        {"feed_forward": "swiglu"},
        {**LLAMA_BLOCKS, "rope_frequencies": tuple(10.0 ** -(n / 4) for n in range(16))},
    ],
    ids=["ours", "shared heads", "normed heads", "biases", "swiglu", "llama"],
)
MOST_ERROR = 3e-2
"""Of what a block adds, in its norm: rotations are in bf16, new keys and values rounded, and then rows otherwise."""


def rounded(rows: Tensor) -> Tensor:
    """Rows as multiples of a 127th of their largest component."""
    steps = rows.abs().amax(-1, keepdim=True) / 127 + 1e-12
    return torch.round(rows / steps) * steps


class RoundedLinear(nn.Module):
    """A linear layer that rounds its weights and what it is given, and nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight.double()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = rounded(x.double()) @ self.weight.T
        return product if self.bias is None else product + self.bias.double()


def with_rounded_linears(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module).double()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, RoundedLinear(child))
    return module


def rows_in_int8(*shape: int, generator: torch.Generator) -> CachedRows:
    rows = CachedRows.zeros(*shape, device=torch.device("cpu"), dtype=torch.int8)
    rows.write(torch.arange(shape[0]), torch.randn(*shape, generator=generator))
    return rows


def in_float64(rows: CachedRows) -> CachedRows:
    assert rows.steps is not None
    return CachedRows(rows.of.double() * rows.steps.double()[..., None])


@BLOCKS
@torch.no_grad()
def test_a_layer_does_what_rounded_weights_and_rows_make_of_it(blocks: dict) -> None:
    sizes = {"hidden_dim": 64, "num_heads": 4, "head_dim": 32, "ffn_dim": 96, "cca_layers": (1,)}
    config = small_config(**{**sizes, "num_kv_heads": 4, **blocks, "num_heads": 4, "head_dim": 32})
    layer = random_model(config).to(torch.bfloat16).layers[0]
    eight, expected = Int8Layer(layer), with_rounded_linears(layer)
    generator = torch.Generator().manual_seed(0)
    h_ND = torch.randn(4, 64, generator=generator)
    keys, values = (rows_in_int8(3, config.kv_heads, 40, 32, generator=generator) for _ in range(2))
    of_neighbours = [rows_in_int8(3, 4, 16, 32, generator=generator) for _ in range(2)]
    refusal_BS = torch.where(torch.rand(3, 16, generator=generator) < 0.4, torch.finfo(torch.float32).min, 0.0)
    refusal_BS[:, 3] = 0
    new, new64 = (
        place_new_tokens(config, [5, 0, 20], [2, 1, 1], None, torch.device("cpu"), dtype)
        for dtype in (torch.bfloat16, torch.float64)
    )
    keys64, values64 = in_float64(keys), in_float64(values)

    def assert_adds_the_same(found: Tensor, reference: Tensor) -> None:
        added, expected_added = found.double() - h_ND.double(), reference - h_ND.double()
        assert ((added - expected_added).norm(dim=1) < MOST_ERROR * expected_added.norm(dim=1)).all()

    found = eight.self_attention.step(h_ND, new, keys, values)
    assert_adds_the_same(found, expected.self_attention.step(h_ND.double(), new64, keys64, values64))
    # The new tokens' own rows, and no others.
    written = torch.zeros(3, 40, dtype=torch.bool)
    written[[0, 0, 1, 2], [5, 6, 0, 20]] = True
    for store, store64 in ((keys, keys64), (values, values64)):
        unwritten = ~written[:, None, :, None].expand_as(store.of)
        found64, expected64 = in_float64(store).of, store64.of
        own, own64 = found64[~unwritten], expected64[~unwritten]
        assert (own - own64).norm() < MOST_ERROR * own64.norm()
        assert torch.equal(found64[unwritten], expected64[unwritten])

    assert eight.cca is not None
    found = eight.cca.step(h_ND, new, *of_neighbours, refusal_BS)
    neighbours64 = [in_float64(store) for store in of_neighbours]
    assert_adds_the_same(found, expected.cca.step(h_ND.double(), new64, *neighbours64, refusal_BS.double()))

    assert_adds_the_same(eight.feed_forward(h_ND), expected.feed_forward(h_ND.double()))


@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_many_rows_give_the_sum_of_integers(has_bias: bool) -> None:
    """In bf16, whatever rows are beside them."""
    torch.manual_seed(0)
    linear = nn.Linear(100, 40, bias=has_bias).to(torch.bfloat16)
    x = torch.randn(2, 150, 100).bfloat16()
    eight = Int8Linear(linear.weight, linear.bias)
    found = eight(x)
    torch.testing.assert_close(found.double(), RoundedLinear(linear)(x), rtol=1e-2, atol=1e-2)
    assert torch.equal(found[1:, 7:20], eight(x[1:, 7:20]))
