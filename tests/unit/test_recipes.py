"""Recipes: the paper's sizes, and names that a person can mistype."""

import json

import pytest
import torch

from retro_ray.config import RunConfig
from retro_ray.errors import ConfigError
from retro_ray.model import RetroModel
from retro_ray.recipes import RECIPES, get_recipe

PAPER_WEIGHTS_M = {"paper-172m": 172, "paper-425m": 425, "paper-1.5b": 1451, "paper-7.5b": 7532}
PAPER_BASELINE_M = {"paper-172m": 132, "paper-425m": 368, "paper-1.5b": 1309, "paper-7.5b": 6982}


def model_of(config: RunConfig) -> RetroModel:
    with torch.device("meta"):
        return RetroModel(config.model)


@pytest.mark.parametrize("name", PAPER_WEIGHTS_M)
def test_paper_recipes_have_the_papers_weights(name: str) -> None:
    model = model_of(RECIPES[name](vocab_size=32_000))
    assert model.count_parameters() / 1e6 == pytest.approx(PAPER_WEIGHTS_M[name], rel=0.05)
    retrieval = sum(
        weight.numel()
        for weight_name, weight in model.named_parameters()
        if weight_name.startswith(("encoder.", "neighbour_embedding.")) or ".cca." in weight_name
    )
    table = model.config.vocab_size * model.config.encoder_dim
    baseline = model.count_parameters() - (retrieval - table)
    assert baseline / 1e6 == pytest.approx(PAPER_BASELINE_M[name], rel=0.05)


@pytest.mark.parametrize("name", PAPER_WEIGHTS_M)
def test_paper_recipes_follow_the_papers_table(name: str) -> None:
    config = get_recipe(name)(vocab_size=32_000)
    large = name in ("paper-1.5b", "paper-7.5b")
    assert config.model.context_length == 2048
    assert config.model.cca_layers[:3] == ((9, 12, 15) if large else (6, 9, 12))
    assert config.model.cca_start == "paper"
    assert not config.model.pointer
    assert config.training.learning_rate == (1e-4 if name == "paper-7.5b" else 2e-4)
    assert config.training.batch_size == (1024 if name == "paper-7.5b" else 256)
    tokens = config.training.num_steps * config.training.batch_size * config.model.context_length
    assert tokens == pytest.approx(419.4e9, rel=1e-4)


@pytest.mark.parametrize(("name", "least", "most"), [("tiny", 1e6, 5e6), ("small", 25e6, 40e6)])
def test_own_recipes_are_about_as_large_as_they_say(name: str, least: float, most: float) -> None:
    assert least < model_of(RECIPES[name](vocab_size=16_384)).count_parameters() < most


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_and_survive_their_record(name: str) -> None:
    config = get_recipe(name)(vocab_size=1000, chunk_length=32)
    assert config.recipe == name
    assert (config.model.vocab_size, config.model.chunk_length) == (1000, 32)
    assert config.training.batch_size % config.training.micro_batch_size == 0
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_recipe_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"recipe is 'tinny'; it must be one of tiny, small, paper-172m"):
        get_recipe("tinny")
