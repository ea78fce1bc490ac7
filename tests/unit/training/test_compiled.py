"""Compiled blocks: the same losses, and nothing compiled for a validation's changing shapes.

Dynamo traces the blocks here, and torch's own operators run what it found: kernels are for a GPU to make.
"""

import dataclasses
import importlib.util
import shutil
from functools import partial

import pytest
import torch

from retro_ray.model import int8_training
from retro_ray.model.retro import RetroModel
from retro_ray.training import vocabulary_loss
from retro_ray.training.compiled import resolve_compile
from retro_ray.training.step import TrainingStep
from tests.fakes import tiny_run_config, write_tiny_database
from tests.unit.training.test_step import batches_of

# Dynamo looks for gradients wherever there may be some.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return write_tiny_database(tmp_path_factory.mktemp("home"))


@pytest.fixture
def num_compiled(monkeypatch):
    """How many graphs were compiled so far."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    torch.compiler.reset()
    vocabulary_loss._fused_nats_and_slopes.cache_clear()
    yield lambda: len(graphs)
    torch.compiler.reset()
    vocabulary_loss._fused_nats_and_slopes.cache_clear()


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-5), ("bf16", 1e-2), ("int8", 1e-2)])
def test_steps_are_those_of_a_model_that_is_not_compiled(database, num_compiled, precision, rounding, monkeypatch):
    """Padded windows and sequences without neighbours among them."""
    monkeypatch.setattr(int8_training, "_LEAST_ROWS", 1)
    monkeypatch.setattr(int8_training, "LEAST_INT8_WIDTH", 1)
    losses, config = {}, tiny_run_config(database, learning_rate=1e-3, num_warmup_steps=0, precision=precision)
    batches, model_config = batches_of(database, config), dataclasses.replace(config.model, pointer=True)
    for choice in ("no", "yes"):
        torch.manual_seed(0)
        model = RetroModel(model_config)
        step = TrainingStep(model, dataclasses.replace(config.training, compile=choice), CPU)
        losses[choice] = [step.run(batches.at(number)).loss.item() for number in range(2)]
        assert (num_compiled() > 0) == (choice == "yes")
    assert losses["yes"] == pytest.approx(losses["no"], rel=rounding)
    assert losses["yes"][1] != pytest.approx(losses["yes"][0], rel=1e-3)

    # Neither a validation, whose shapes change, nor more layers of the same kinds are compiled anew.
    before, batch = num_compiled(), batches.at(1).batch
    with step.whole_weights(), torch.no_grad():
        for length in (5, 9, 17):
            assert model(batch.tokens_BT[:, :length]).isfinite().all()
    deeper = RetroModel(dataclasses.replace(model_config, num_layers=config.model.num_layers + 3))
    TrainingStep(deeper, dataclasses.replace(config.training, compile="yes"), CPU).run(batches.at(0))
    assert num_compiled() == before


def test_auto_compiles_where_a_gpu_has_what_it_takes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert resolve_compile("auto", GPU)
    assert not resolve_compile("auto", CPU)
    assert resolve_compile("yes", CPU)
    assert not resolve_compile("no", GPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not resolve_compile("auto", GPU)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not resolve_compile("auto", GPU)
