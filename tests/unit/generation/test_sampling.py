import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retro_ray.errors import PromptError
from retro_ray.generation.sampling import SamplingConfig, penalise_repetition, sample_token, token_probabilities


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64)


@pytest.mark.parametrize(
    ("filters", "probabilities", "expected"),
    [
        ({}, (0.2, 0.5, 0.3), (0.2, 0.5, 0.3)),
        # Half the temperature squares the odds.
        ({"temperature": 0.5}, (0.2, 0.5, 0.3), (4 / 38, 25 / 38, 9 / 38)),
        ({"top_k": 2}, (0.2, 0.5, 0.3), (0, 5 / 8, 3 / 8)),
        ({"top_k": 1}, (0.2, 0.5, 0.3), (0, 1, 0)),
        ({"top_k": 9}, (0.2, 0.5, 0.3), (0.2, 0.5, 0.3)),
        # The smallest set that holds at least this much: 0.5 is short of 0.6, 0.5 + 0.3 is not.
        ({"top_p": 0.6}, (0.2, 0.5, 0.3), (0, 5 / 8, 3 / 8)),
        ({"top_p": 0.9}, (0.2, 0.5, 0.3), (0.2, 0.5, 0.3)),
        # However small top_p is, the likeliest token stays.
        ({"top_p": 1e-9}, (0.2, 0.5, 0.3), (0, 1, 0)),
        # 0.25 + 0.25 holds exactly 0.5, so two are enough; equal ones go to the lower id.
        ({"top_p": 0.5}, (0.25, 0.25, 0.25, 0.25), (0.5, 0.5, 0, 0)),
        ({"top_k": 3}, (0.25, 0.25, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3, 0)),
        ({"min_p": 0.5}, (0.2, 0.5, 0.3), (0, 5 / 8, 3 / 8)),
        ({"min_p": 1.0}, (0.2, 0.5, 0.3), (0, 1, 0)),
        # top_p looks at what top_k left, renormalised: 0.5 / 0.8 = 0.625 holds 0.6 alone.
        ({"top_k": 2, "top_p": 0.6}, (0.2, 0.5, 0.3), (0, 1, 0)),
    ],
)
def test_the_filters_keep_exactly_what_they_say(filters, probabilities, expected) -> None:
    result = token_probabilities(logits_of(*probabilities), SamplingConfig(**filters))
    np.testing.assert_allclose(result, expected, atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 300),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_the_filters_together_equal_those_of_transformers(seed, vocab_size, temperature, top_k, top_p, min_p) -> None:
    logits = 3 * torch.randn(1, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    reference = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        reference = TopKLogitsWarper(top_k)(None, reference)
    if top_p < 1:
        reference = TopPLogitsWarper(top_p)(None, reference)
    reference = MinPLogitsWarper(min_p)(None, reference)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(token_probabilities(logits[0], config), reference.softmax(-1)[0], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    seen=st.lists(st.integers(0, 29), min_size=1, max_size=20),
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_the_repetition_penalty_is_that_of_transformers(seed: int, seen: list[int], penalty: float) -> None:
    logits = 3 * torch.randn(30, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    penalised = penalise_repetition(logits, seen, SamplingConfig(repetition_penalty=penalty))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None])[0]
    torch.testing.assert_close(penalised, expected)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_temperature_zero_takes_the_likeliest() -> None:
    config = SamplingConfig(temperature=0, seed=1)
    assert sample_token(logits_of(0.2, 0.5, 0.3), config, config.new_generator()) == 1


def test_draws_follow_the_distribution() -> None:
    config = SamplingConfig(top_k=3, seed=0)
    generator = config.new_generator()
    logits = logits_of(0.4, 0.3, 0.1, 0.2)
    draws = torch.tensor([sample_token(logits, config, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    # Four standard deviations of a share are about 0.032; the token that top_k drops never comes.
    torch.testing.assert_close(shares, torch.tensor([4 / 9, 3 / 9, 0, 2 / 9]), atol=0.032, rtol=0)
    assert shares[2] == 0


def test_a_seed_decides_the_draws_and_its_absence_leaves_them_free() -> None:
    logits = torch.zeros(1000)

    def draws(seed: int | None) -> list[int]:
        config = SamplingConfig(seed=seed)
        generator = config.new_generator()
        return [sample_token(logits, config, generator) for _ in range(8)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.3}, {"min_p": 0.5}, {"top_k": 2}])
@pytest.mark.parametrize("extreme", [{"repetition_penalty": 5e-324}, {"temperature": 5e-324}])
def test_the_smallest_values_that_are_allowed(filters: dict, extreme: dict) -> None:
    """A token that is seen and likely is all that is left, as close to a limit as numbers come."""
    config = SamplingConfig(**filters, **extreme)
    logits_V = penalise_repetition(torch.tensor([1.0, 3.0, -2.0]), [1, 2], config)
    assert logits_V.isfinite().all()
    np.testing.assert_array_equal(token_probabilities(logits_V, config), [0, 1, 0])
    assert sample_token(logits_V, config, config.new_generator()) == 1


def test_half_precision_logits_and_a_vocabulary_with_impossible_tokens() -> None:
    logits = torch.full((50_000,), -math.inf, dtype=torch.bfloat16)
    logits[123] = 1.0
    config = SamplingConfig(top_p=0.9, seed=0)
    assert sample_token(logits, config, config.new_generator()) == 123


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(PromptError, match=f"^{name} is {value}"):
        SamplingConfig(**{name: value})
