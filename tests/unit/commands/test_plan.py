import json

import pytest
import torch

from retro_ray.commands.plan import Plan
from retro_ray.config import TrainingConfig
from retro_ray.errors import ConfigError
from retro_ray.training.flops import training_flops_per_token
from retro_ray.training.measure import training_rate
from tests.fakes import write_tiny_database
from tests.unit.model.models import small_config


def planned(capsys: pytest.CaptureFixture[str], **flags: object) -> dict:
    Plan(json=True, **flags).run()
    return json.loads(capsys.readouterr().out)


def test_the_papers_largest_on_64_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, recipe="paper-7.5b", num_workers=64, measured_flops=4e14)
    assert found["parameters"]["total"] - found["parameters"]["embeddings"] == pytest.approx(7.532e9, rel=0.05)
    ddp, fsdp = (found["memory_per_worker"][kind] for kind in ("ddp", "fsdp"))
    assert ddp["total"] == sum(value for part, value in ddp.items() if part != "total")
    assert ddp["total"] > 140e9 > 80e9 > fsdp["total"] - fsdp["activations"]
    assert found["tokens_per_second"] == pytest.approx(64 * 4e14 / found["flops_per_token"])
    assert found["days"] == pytest.approx(419.4e9 / found["tokens_per_second"] / 86_400, rel=0.001)
    less = planned(capsys, recipe="paper-7.5b", num_workers=64, measured_flops=4e14, gradient_checkpointing=True)
    assert less["memory_per_worker"]["fsdp"]["activations"] < fsdp["activations"] / 4


def test_for_a_database(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    manifest = write_tiny_database(tmp_path).manifest
    found = planned(capsys, recipe="tiny", home=tmp_path, steps=20, batch_size=2, measured_flops=1e12)
    assert found["vocab_size"] == manifest.vocab_size
    assert found["tokens"] == 20 * 2 * 8 * manifest.chunk_length


def test_the_table_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Plan(recipe="paper-172m", num_workers=8, measured_flops=1e14).run()
    table = capsys.readouterr().out
    found = planned(capsys, recipe="paper-172m", num_workers=8, measured_flops=1e14)
    assert f"{found['parameters']['total'] / 1e6:,.1f}" in table
    assert f"{found['days']:,.2f} days" in table
    assert "TFLOP/s per worker (given)" in table


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_workers": 0}, "--num-workers is 0"),
        ({"measured_flops": -1.0}, "--measured-flops is -1"),
        ({"recipe": "huge"}, "recipe is 'huge'"),
        ({"recipe": "tiny", "num_workers": 9}, "--num-workers is 9, more than --batch-size 4"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Plan(**{"measured_flops": 1e12, **flags}).run()


def test_a_rate_is_that_of_real_steps() -> None:
    config = small_config()
    rate = training_rate(config, TrainingConfig(batch_size=2, micro_batch_size=2), torch.device("cpu"))
    assert 0 < rate / training_flops_per_token(config) < 1e9
