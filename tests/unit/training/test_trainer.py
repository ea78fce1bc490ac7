import json

import pytest
import torch

from retro_ray.errors import MismatchError
from retro_ray.training.checkpoint import list_checkpoints, load_model
from retro_ray.training.progress import read_metrics
from retro_ray.training.step import TrainingStep
from retro_ray.training.trainer import Trainer, TrainingJob
from tests.fakes import tiny_run_config, write_tiny_database

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_tiny_database(home)
    return home


@pytest.fixture(scope="module")
def config(home):
    from retro_ray.database.store import Database

    return tiny_run_config(Database.open(home), optimizer="muon")


def rows_of(run) -> list[dict]:
    """What a run wrote, without its timings."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


class Killed(Exception):
    pass


def train_killed_at(monkeypatch, job, step: int) -> None:
    """Train until the process dies inside step `step`."""
    run = TrainingStep.run

    def run_or_die(self, share):
        if share.step == step:
            raise Killed
        return run(self, share)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "run", run_or_die)
        with pytest.raises(Killed):
            Trainer(job, CPU, say=lambda line: None).run()


def test_a_run_leaves_metrics_validations_checkpoints_and_a_plot(home, config, tmp_path):
    job = TrainingJob(home=home, run_directory=tmp_path / "run", config=config)
    lines: list[str] = []
    outcome = Trainer(job, CPU, lines.append).run()
    rows = rows_of(job.run_directory)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation_bpb_on" in row] == [6, 12]
    assert rows[-1] == {
        "step": 12,
        "validation_bpb_on": outcome.validation["on"],
        "validation_bpb_off": outcome.validation["off"],
    }
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5, "it learns"
    assert [path.name for path in list_checkpoints(job.run_directory)] == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert load_model(job.run_directory)[2].validation == outcome.validation
    assert (job.run_directory / "loss.png").exists()
    assert outcome.steps == 12
    assert outcome.tokens_per_second > 0
    assert any(line.startswith("step 12/12 | loss") for line in lines)


# Before the first checkpoint, right behind one, and between checkpoint and validation.
@pytest.mark.parametrize("step", [2, 8, 11])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(home, config, tmp_path, monkeypatch, step):
    undisturbed = TrainingJob(home=home, run_directory=tmp_path / "undisturbed", config=config)
    killed = TrainingJob(home=home, run_directory=tmp_path / "killed", config=config)
    Trainer(undisturbed, CPU, say=lambda line: None).run()
    train_killed_at(monkeypatch, killed, step)
    lines: list[str] = []
    Trainer(killed, CPU, lines.append).run()
    assert (f"continuing from step {step // 4 * 4}" in lines) == (step >= 4)
    assert rows_of(killed.run_directory) == rows_of(undisturbed.run_directory)
    a, b = (load_model(job.run_directory)[0] for job in (undisturbed, killed))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_torn_newest_checkpoint_costs_time_and_nothing_else(home, config, tmp_path, monkeypatch):
    undisturbed = TrainingJob(home=home, run_directory=tmp_path / "undisturbed", config=config)
    killed = TrainingJob(home=home, run_directory=tmp_path / "killed", config=config)
    Trainer(undisturbed, CPU, say=lambda line: None).run()
    train_killed_at(monkeypatch, killed, 10)
    (killed.run_directory / "checkpoints" / "step-00000008" / "model.safetensors").write_bytes(b"torn")
    lines: list[str] = []
    Trainer(killed, CPU, lines.append).run()
    assert "continuing from step 4" in lines
    assert rows_of(killed.run_directory) == rows_of(undisturbed.run_directory)


def test_a_finished_run_is_left_as_it_is(home, config, tmp_path):
    job = TrainingJob(home=home, run_directory=tmp_path, config=config)
    first = Trainer(job, CPU, say=lambda line: None).run()
    before = rows_of(tmp_path)
    again = Trainer(job, CPU, say=lambda line: None).run()
    assert (again.steps, again.validation) == (first.steps, first.validation)
    assert rows_of(tmp_path) == before


def test_another_tokenizer_is_refused(home, config, tmp_path):
    job = TrainingJob(home=home, run_directory=tmp_path / "run", config=config)
    Trainer(job, CPU, say=lambda line: None).run()
    other_home = tmp_path / "other"
    write_tiny_database(other_home, seed=1)
    with pytest.raises(MismatchError, match="tokenizer"):
        Trainer(TrainingJob(home=other_home, run_directory=job.run_directory, config=config), CPU)


def test_a_changed_database_is_warned_of(home, config, tmp_path):
    job = TrainingJob(home=home, run_directory=tmp_path, config=config)
    Trainer(job, CPU, say=lambda line: None).run()
    for path in tmp_path.glob("checkpoints/*/checkpoint.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "database_version": "0" * 16}))
    lines: list[str] = []
    Trainer(job, CPU, lines.append)
    assert any(line.startswith("warning: the run was trained with database version 0000000000000000") for line in lines)


def test_without_validation_documents_a_run_has_no_validation(config, tmp_path):
    write_tiny_database(tmp_path, num_validation_documents=0)
    job = TrainingJob(home=tmp_path, run_directory=tmp_path / "run", config=config)
    assert Trainer(job, CPU, say=lambda line: None).run().validation == {}
    assert not any("validation_bpb_on" in row for row in rows_of(job.run_directory))
