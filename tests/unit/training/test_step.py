import dataclasses

import pytest
import torch
import torch.nn.functional as F

from retro_ray.model import int8_training
from retro_ray.model.layers import Linear
from retro_ray.model.retro import RetroModel
from retro_ray.precision import arithmetic
from retro_ray.training.batches import StepBatch, TrainingBatches
from retro_ray.training.step import NextTokenLoss, TrainingStep
from retro_ray.training.windows import NO_TARGET, ChunkTable, WindowReader, stored_neighbours
from tests.fakes import tiny_run_config, write_tiny_database

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return write_tiny_database(tmp_path_factory.mktemp("home"))


def batches_of(database, config, rank=0, world_size=1) -> TrainingBatches:
    table = ChunkTable(database.segments)
    neighbours = stored_neighbours(table, database, config.model.num_neighbours)
    reader = WindowReader(table, database, neighbours=neighbours, end_target=database.tokenizer.eos_id)
    return TrainingBatches(
        reader,
        num_chunks=config.model.num_chunks,
        batch_size=config.training.batch_size,
        seed=0,
        retrieval_dropout=0.2,
        rank=rank,
        world_size=world_size,
    )


def model_of(config) -> RetroModel:
    torch.manual_seed(0)
    return RetroModel(config.model)


def loss_reference(model: RetroModel, share: StepBatch) -> torch.Tensor:
    batch = share.batch
    logits = model(
        batch.tokens_BT,
        neighbours_BLKR=batch.neighbours_BLKR,
        neighbour_mask_BLKR=batch.neighbour_mask_BLKR,
        segments_BT=batch.segments_BT,
    )
    return F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=NO_TARGET)


def test_loss_is_the_mean_of_nats_over_all_targets_however_they_are_divided(database):
    losses, weights = [], []
    for micro_batch_size in (4, 3, 1):
        config = tiny_run_config(database, micro_batch_size=micro_batch_size)
        model, share = model_of(config), batches_of(database, config).at(0)
        want = loss_reference(model, share).item()
        result = TrainingStep(model, config.training, CPU).run(share)
        assert result.loss.item() == pytest.approx(want, rel=1e-5)
        losses.append(result.gradient_norm.item())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-3, atol=1e-5)


def test_gradients_of_two_workers_add_up_to_those_of_one(database):
    """What DDP averages, times the number of workers, is the gradient of the loss over all targets."""
    config = tiny_run_config(database, batch_size=5)

    def gradient(shares: list[StepBatch]) -> torch.Tensor:
        model = model_of(config)
        module = NextTokenLoss(model)
        for share in shares:
            loss, _ = module(*vars(share.batch).values())
            (loss / share.num_targets).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    alone = gradient([batches_of(database, config).at(3)])
    shares = [batches_of(database, config, rank, 2).at(3) for rank in range(2)]
    assert [len(share.batch) for share in shares] == [3, 2]
    torch.testing.assert_close(gradient(shares), alone, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(database):
    config = tiny_run_config(database, max_gradient_norm=1e-3, num_warmup_steps=0, weight_decay=0.0)
    seen = []
    model = model_of(config)
    step = TrainingStep(model, config.training, CPU)
    inner = step.optimizer.step
    step.optimizer.step = lambda number: (
        seen.append([p.grad.clone() for p in step.optimizer.parameters]) or inner(number)
    )
    result = step.run(batches_of(database, config).at(0))
    assert result.gradient_norm > 0.01
    assert torch.nn.utils.get_total_norm(seen[0]).item() == pytest.approx(1e-3, rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(database):
    config = tiny_run_config(database, precision="bf16", learning_rate=1e-3)
    model, share = model_of(config), batches_of(database, config).at(0)
    want = loss_reference(model, share).item()
    result = TrainingStep(model, config.training, CPU).run(share)
    assert result.loss.item() == pytest.approx(want, rel=2e-2)
    assert result.loss.item() != pytest.approx(want, rel=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture
def all_in_int8(monkeypatch):
    """Products that are too small for it, too."""
    monkeypatch.setattr(int8_training, "_LEAST_ROWS", 1)
    monkeypatch.setattr(int8_training, "LEAST_INT8_WIDTH", 1)


def curve(database, precision: str, num_steps: int = 12, gradient_checkpointing: bool = False) -> list[float]:
    config = tiny_run_config(database, precision=precision)
    model = model_of(config)
    model.gradient_checkpointing = gradient_checkpointing
    step, batches = TrainingStep(model, config.training, CPU), batches_of(database, config)
    return [step.run(batches.at(number)).loss.item() for number in range(num_steps)]


@pytest.mark.usefixtures("all_in_int8")
def test_in_eight_bits_it_learns_as_in_bf16_and_the_same_each_time(database):
    in_int8, in_bf16 = curve(database, "int8"), curve(database, "bf16")
    assert in_int8[-1] < 0.8 * in_int8[0]
    assert in_int8 == pytest.approx(in_bf16, rel=0.02)
    assert in_int8 != in_bf16
    assert curve(database, "int8", 3) == in_int8[:3]
    assert curve(database, "int8", 3, gradient_checkpointing=True) == in_int8[:3]


@pytest.mark.usefixtures("all_in_int8")
def test_in_eight_bits_neighbours_reach_no_earlier_position(database):
    """Each row is rounded by what is in it alone: forward to the bit, and backward as zeros."""
    config = tiny_run_config(database, precision="int8")
    model, batch = model_of(config), batches_of(database, config).at(0).batch
    TrainingStep(model, config.training, CPU)
    chunk_length = config.model.chunk_length
    others = batch.neighbours_BLKR.clone()
    others[:, 1] = (others[:, 1] + 1) % config.model.vocab_size

    def hidden(neighbours_BLKR: torch.Tensor) -> torch.Tensor:
        with arithmetic("int8", CPU):
            return model.output(batch.tokens_BT, neighbours_BLKR=neighbours_BLKR).hidden

    first, changed = hidden(batch.neighbours_BLKR), hidden(others)
    until = 2 * chunk_length - 1
    assert torch.equal(first[:, :until], changed[:, :until])
    assert not torch.equal(first[:, until:], changed[:, until:])


def test_resolved_precision_decides_what_is_trained_in_eight_bits(database):
    config = tiny_run_config(database)
    for precision, want in (("int8", True), ("bf16", False), ("fp32", False)):
        model = model_of(config)
        TrainingStep(model, dataclasses.replace(config.training, precision=precision), CPU)
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        assert linears
        assert {linear.trains_in_int8 for linear in linears} == {want}


def test_gradient_checkpointing_changes_memory_alone(database):
    config = tiny_run_config(database)
    norms = []
    for recompute in (False, True):
        model = model_of(config)
        model.gradient_checkpointing = recompute
        norms.append(TrainingStep(model, config.training, CPU).run(batches_of(database, config).at(0)).gradient_norm)
    assert torch.equal(*norms)


def test_a_model_without_retrieval_trains_on_batches_without_neighbours(database):
    config = tiny_run_config(database)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, cca_layers=(), num_neighbours=0))
    share = batches_of(database, config).at(0)
    assert share.batch.neighbours_BLKR is None
    assert TrainingStep(model_of(config), config.training, CPU).run(share).loss.isfinite()
