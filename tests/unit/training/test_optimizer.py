import math

import pytest
import torch

from retro_ray.config import TrainingConfig
from retro_ray.errors import CheckpointError
from retro_ray.model.retro import RetroModel
from retro_ray.training.optimizer import Optimizer, learning_rate
from tests.fakes import tiny_run_config, write_tiny_database


@pytest.fixture(scope="module")
def model_config(tmp_path_factory):
    return tiny_run_config(write_tiny_database(tmp_path_factory.mktemp("home"))).model


def test_schedule_is_the_papers():
    config = TrainingConfig(num_steps=1001, num_warmup_steps=100, learning_rate=2e-4)
    assert learning_rate(0, config) == 1e-7
    assert learning_rate(50, config) == pytest.approx((1e-7 + 2e-4) / 2)
    assert learning_rate(100, config) == pytest.approx(2e-4)
    assert learning_rate(550, config) == pytest.approx(2e-4 * (0.1 + 0.9 * 0.5))
    assert learning_rate(1000, config) == pytest.approx(2e-5)
    rates = [learning_rate(step, config) for step in range(1001)]
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_schedule_without_warmup_and_of_one_step():
    assert learning_rate(0, TrainingConfig(num_steps=1, num_warmup_steps=0, learning_rate=1e-3)) == 1e-3
    assert math.isfinite(learning_rate(0, TrainingConfig(num_steps=1, num_warmup_steps=1)))


def with_gradients(model: RetroModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_saved_state_gives_the_same_next_step_bit_for_bit(model_config, kind):
    config = TrainingConfig(optimizer=kind, num_warmup_steps=0, learning_rate=1e-2)
    torch.manual_seed(0)
    model = RetroModel(model_config)
    optimizer = Optimizer(model, config)
    for step in range(3):
        with_gradients(model, step)
        optimizer.step(step)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: t.clone() for name, t in optimizer.tensors().items()}

    other = RetroModel(model_config)
    other.load_state_dict(weights, strict=False)
    other_optimizer = Optimizer(other, config)
    other_optimizer.load_tensors(state)
    for trained, with_optimizer in ((model, optimizer), (other, other_optimizer)):
        with_gradients(trained, 3)
        with_optimizer.step(3)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, weights[name]), name


def test_muon_gets_the_matrices_inside_the_blocks_alone(model_config):
    model = RetroModel(model_config)
    optimizer = Optimizer(model, TrainingConfig(optimizer="muon"))
    with_gradients(model, 0)
    optimizer.step(0)
    by_muon = {name.rpartition("/")[0] for name in optimizer.tensors() if name.endswith("/momentum_buffer")}
    vocabulary = {name for name, p in model.named_parameters() if model_config.vocab_size in p.shape}
    assert vocabulary == {"token_embedding.weight"}
    assert by_muon == {name for name, p in model.named_parameters() if p.ndim == 2} - vocabulary


def test_vectors_do_not_decay(model_config):
    model = RetroModel(model_config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, TrainingConfig(weight_decay=0.5, learning_rate=0.1, num_warmup_steps=0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0)
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_frozen_weights_are_left_alone(model_config):
    model = RetroModel(model_config)
    model.layers[0].requires_grad_(False)
    frozen = {id(p) for p in model.layers[0].parameters()}
    assert frozen
    assert not frozen & {id(p) for p in Optimizer(model, TrainingConfig()).parameters}


def test_state_of_another_optimizer_or_model_is_refused(model_config):
    model = RetroModel(model_config)
    optimizer = Optimizer(model, TrainingConfig(optimizer="muon"))
    with_gradients(model, 0)
    optimizer.step(0)
    with pytest.raises(CheckpointError, match="--optimizer"):
        Optimizer(model, TrainingConfig(optimizer="adamw")).load_tensors(optimizer.tensors())
    with pytest.raises(CheckpointError, match=r"elsewhere\.weight/exp_avg"):
        optimizer.load_tensors({"elsewhere.weight/exp_avg": torch.zeros(1)})
