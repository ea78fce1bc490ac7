"""Nats of targets against the whole distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.evaluation.target_nats import target_nats
from retro_ray.model.pointer import DecoderOutput, Pointed
from retro_ray.model.retro import RetroModel
from retro_ray.training.vocabulary_loss import LOGITS_AT_ONCE
from tests.unit.model.models import small_config

_ROWS = 6


@given(
    seed=st.integers(0, 10_000),
    pointing=st.sampled_from([None, 0.0, 0.3, 0.95]),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
    positions_at_once=st.integers(1, 9),
)
def test_they_are_those_of_the_whole_distribution(seed, pointing, sharpness, positions_at_once):
    torch.manual_seed(seed)
    model = RetroModel(small_config(pointer=pointing is not None)).double()
    count, vocab_size = 7, model.config.vocab_size
    hidden = sharpness * torch.randn(count, model.config.hidden_dim, dtype=torch.float64)
    pointed = None
    if pointing is not None:
        shares = torch.rand(count, _ROWS, dtype=torch.float64).softmax(-1) * pointing
        tokens = torch.randint(0, 4, (2, _ROWS))  # some of them the same
        kept = torch.full((count,), 1 - pointing, dtype=torch.float64)
        pointed = Pointed(shares, kept.log(), torch.randint(0, 2, (count,)), tokens)
    output = DecoderOutput(hidden, pointed)
    targets = torch.randint(0, 6, (count,))

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGITS_AT_ONCE, "cpu", positions_at_once * vocab_size)
        nats, is_likeliest = target_nats(model, output, targets)
        shares_NV = model.read_out(output).softmax(-1)

    of_targets = shares_NV.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(nats, -of_targets.log(), atol=1e-9, rtol=1e-9)
    clear = (of_targets - shares_NV.scatter(1, targets[:, None], 0.0).amax(1)).abs() > 1e-9
    assert torch.equal(is_likeliest[clear], (of_targets >= shares_NV.amax(1))[clear])
