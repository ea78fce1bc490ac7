"""What a run would take: against numbers worked out by hand, and against real models."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from retro_ray.config import ModelConfig, RunConfig, TrainingConfig
from retro_ray.model import RetroModel
from retro_ray.recipes import RECIPES, get_recipe
from retro_ray.training.optimizer import Optimizer
from retro_ray.training.plan import activation_bytes, count_parameters, duration, memory_per_worker, optimizer_bytes
from tests.properties.test_model_reference import model_configs
from tests.unit.model.models import small_config

BY_HAND = RunConfig(
    recipe="by hand",
    model=small_config(vocab_size=100, share_encoder_embedding=True, cca_layers=(2,), encoder_layers=1),
    training=TrainingConfig(num_steps=10, batch_size=8, micro_batch_size=4),
)
"""Chunks of 4 tokens, 4 to a sequence; widths of 16; 3 layers."""
ATTENTION, FEED_FORWARD = 4 * 16 * 16 + 16, 2 * 16 * 24 + 16
ENCODER = 4 * 16 * 16 + 16 + 2 * 16 * 20 + 16 + (4 * 16 * 16 + 16) + 2 * 16


def test_parameters_by_hand() -> None:
    counts = count_parameters(BY_HAND.model)
    assert counts.decoder == 3 * (ATTENTION + FEED_FORWARD) + 16
    assert (counts.cross_attention, counts.encoder, counts.embeddings) == (ATTENTION, ENCODER, 1600)
    assert counts.largest_block == ENCODER


@given(config=model_configs())
@settings(max_examples=60, deadline=None)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    counts, model = count_parameters(config), RetroModel(config)
    assert counts.total == model.count_parameters(include_embeddings=True)
    assert counts.total - counts.embeddings == model.count_parameters()
    of_encoder = sum(weight.numel() for weight in model.encoder.parameters()) if model.encoder else 0
    assert counts.encoder == of_encoder
    blocks = [block for layer in model.layers for block in (layer.self_attention, layer.cca, layer.feed_forward)]
    largest = max(sum(w.numel() for w in block.parameters()) for block in [*blocks, model.encoder] if block is not None)
    assert counts.largest_block == largest


@pytest.mark.parametrize("name", list(RECIPES))
def test_parameters_of_every_recipe(name: str) -> None:
    config = get_recipe(name)(128_000).model
    with torch.device("meta"):
        model = RetroModel(config)
    assert count_parameters(config).total == model.count_parameters(include_embeddings=True)


def test_memory_by_hand() -> None:
    total = count_parameters(BY_HAND.model).total
    # A token of the decoder: 3 layers of attention (q, k, v, result) and feed-forward, the last norm; 4 of
    # neighbours in the encoder, its context, and one chunked cross-attention.
    layer = (6 * 16 + 2 * 4 * 16) + (6 * 16 + 2 * 2 * 24)
    encoder = 4 * ((6 * 16 + 2 * 4 * 16) + (6 * 16 + 2 * 2 * 20) + (6 * 16 + 2 * 2 * 16) + 6 * 16) + (
        6 * 16 + 2 * 2 * 16
    )
    cca = 6 * 16 + 2 * 2 * 16 + 4 * 2 * 2 * 16
    sequence = 16 * (3 * layer + encoder + cca + 6 * 16)
    assert activation_bytes(BY_HAND.model, gradient_checkpointing=False) == sequence
    ddp = memory_per_worker(BY_HAND, 2, "ddp")
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (6 * total, 4 * total, 8 * total)
    assert ddp.activations == 4 * sequence
    assert ddp.total == 18 * total + 4 * sequence
    fsdp = memory_per_worker(BY_HAND, 2, "fsdp")
    assert fsdp.weights == 2 * total + 4 * (1600 + 2 * ENCODER) + 2 * total
    assert fsdp.gradients == 2 * total + 4 * (1600 + ENCODER)
    assert (fsdp.optimizer, fsdp.activations) == (4 * total, ddp.activations)
    assert memory_per_worker(BY_HAND, 8, "ddp").activations == sequence, "a worker's share is one sequence"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_the_real_ones(optimizer: str) -> None:
    config = dataclasses.replace(BY_HAND.training, optimizer=optimizer)
    model = RetroModel(BY_HAND.model)
    model(
        torch.zeros(1, 8, dtype=torch.int64), neighbours_BLKR=torch.zeros(1, 2, 2, 8, dtype=torch.int64)
    ).sum().backward()
    state = Optimizer(model, config)
    state.step(0)
    kept = sum(t.nbytes for name, t in state.tensors().items() if not name.endswith("/step"))
    assert optimizer_bytes(count_parameters(BY_HAND.model), config) == pytest.approx(kept, rel=0.02)


WIDE = {"hidden_dim": 96, "head_dim": 24, "num_heads": 4, "ffn_dim": 384, "encoder_dim": 72, "encoder_ffn_dim": 288}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cca_start": "copy", "encoder_dim": 96},
        {"cca_start": "copy", "encoder_dim": 96, "pointer": True},
        {"cca_layers": ()},
        {"num_kv_heads": 1, "feed_forward": "swiglu"},
        {"encoder_layers": 3, "encoder_ca_layers": (1, 3)},
    ],
)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(changes: dict, gradient_checkpointing: bool) -> None:
    """But for the scores of attention, which a GPU's kernels do not keep, and the copies of weights."""
    config = small_config(**{**WIDE, **changes})
    model = RetroModel(config)
    shapes = {tuple(weight.shape) for weight in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # 29 sequences of 16 tokens: no width is a number of tokens.
        are_scores = tensor.ndim >= 3 and set(tensor.shape[-2:]) <= {4, 8, 16, 17} and tensor.dtype == torch.bfloat16
        if tuple(tensor.shape) not in shapes and not are_scores:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    tokens_BT = torch.zeros(29, 16, dtype=torch.int64)
    neighbours = torch.zeros(29, 4, 2, 8, dtype=torch.int64)
    model.gradient_checkpointing = gradient_checkpointing
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.output(tokens_BT, neighbours_BLKR=neighbours, neighbour_mask_BLKR=neighbours == 0)
    planned = 29 * activation_bytes(config, gradient_checkpointing)
    if gradient_checkpointing:
        one_layer = activation_bytes(dataclasses.replace(config, num_layers=3), False) / 3
        assert sum(kept.values()) < planned < sum(kept.values()) + 29 * 3 * one_layer
    else:
        assert planned == pytest.approx(sum(kept.values()), rel=0.05)


def test_duration_by_hand() -> None:
    paper = get_recipe("paper-7.5b")(128_000)
    plan = duration(paper, num_workers=64, flops_per_worker=4e14)
    assert plan.tokens == pytest.approx(419.4e9, rel=0.001)
    # About 6 FLOP per weight and token, and the encoder sees four neighbour tokens for each.
    assert plan.tokens_per_second == pytest.approx(64 * 4e14 / (6 * 8.3e9), rel=0.1)
    assert plan.days == plan.tokens / plan.tokens_per_second / 86_400
