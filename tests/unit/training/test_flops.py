import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retro_ray.model.retro import RetroModel
from retro_ray.recipes import get_recipe
from retro_ray.training.flops import peak_flops, training_flops_per_token


@pytest.mark.parametrize(
    ("cca_layers", "changes"),
    [
        ((2, 4), {}),
        ((), {}),
        ((2, 4), {"num_kv_heads": 1, "feed_forward": "swiglu"}),
        ((2, 4), {"pointer": True}),
    ],
)
def test_the_count_is_torchs(cca_layers, changes):
    config = get_recipe("tiny")(500, 16).model
    config = dataclasses.replace(config, cca_layers=cca_layers, **changes)
    model = RetroModel(config)
    tokens_BT = torch.randint(0, 500, (2, config.context_length))
    neighbours = torch.randint(0, 500, (2, config.num_chunks, config.num_neighbours, config.neighbour_length))
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT, neighbours_BLKR=neighbours if cca_layers else None).sum().backward()
    # Torch counts the masked half of causal attention too; it is a small part here.
    counted = counter.get_total_flops() / tokens_BT.numel()
    assert training_flops_per_token(config) == pytest.approx(counted, rel=0.06)


def test_a_frozen_decoder_takes_less():
    config = get_recipe("tiny")(500, 16).model
    model = RetroModel(config)
    model.freeze_decoder()
    tokens_BT = torch.randint(0, 500, (2, config.context_length))
    neighbours = torch.randint(0, 500, (2, config.num_chunks, config.num_neighbours, config.neighbour_length))
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT, neighbours_BLKR=neighbours).sum().backward()
    counted = counter.get_total_flops() / tokens_BT.numel()
    assert training_flops_per_token(config, "retrieval") == pytest.approx(counted, rel=0.06)
    assert counted < 0.9 * training_flops_per_token(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_cpus_peak_is_measured(dtype):
    assert 1e8 < peak_flops(torch.device("cpu"), dtype) < 1e14


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Some GPU of tomorrow", None),
    ],
)
def test_a_gpus_peak_is_its_makers(monkeypatch, name, want):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == want
    assert peak_flops(torch.device("cuda"), torch.float32) is None
