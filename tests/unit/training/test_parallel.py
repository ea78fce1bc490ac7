"""FSDP: two processes with a part of the model each give the curve of one, and the same checkpoints."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retro_ray.config import RunConfig
from retro_ray.training.checkpoint import checkpoints_directory, load_model
from retro_ray.training.progress import read_metrics
from retro_ray.training.run_folder import write_config
from retro_ray.training.trainer import Trainer, TrainingJob
from tests.fakes import tiny_run_config, write_tiny_database

ROOT = Path(__file__).parents[3]


def train_alone(home: Path, run: Path, config: RunConfig) -> None:
    job = TrainingJob(home=home, run_directory=run, config=config)
    Trainer(job, torch.device("cpu"), say=lambda line: None).run()


def train_by_two(home: Path, join: Path, *runs: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("one_of_two.py")), str(rank), home, join, *runs],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said


def start_at(run: Path, other: Path, step: int) -> None:
    """The run begins where `other` was at a step."""
    name = f"step-{step:08d}"
    shutil.copytree(checkpoints_directory(other) / name, checkpoints_directory(run) / name)
    shutil.copy(other / "metrics.jsonl", run)


def assert_like(run: Path, other: Path) -> None:
    ours, reference = ([*read_metrics(path / "metrics.jsonl")] for path in (run, other))
    assert len(ours) == len(reference) == 12 + 2
    for a, b in zip(ours, reference, strict=True):
        del a["tokens_per_second" if "loss" in a else "step"], b["tokens_per_second" if "loss" in b else "step"]
        assert a == pytest.approx(b, rel=1e-3)
    a, b = (load_model(path)[0].state_dict() for path in (run, other))
    assert list(a) == list(b)
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], rtol=1e-3, atol=1e-4)


def test_two_workers_with_a_part_each_give_the_curve_of_one_process(tmp_path: Path) -> None:
    """So do they from a checkpoint of one process, and it from one of theirs."""
    config = tiny_run_config(write_tiny_database(tmp_path))
    alone, parts, parts_later, alone_later = (tmp_path / name for name in ("alone", "parts", "later", "alone-later"))
    train_alone(tmp_path, alone, config)
    in_parts = dataclasses.replace(config, training=dataclasses.replace(config.training, parallel="fsdp"))
    for run in (parts, parts_later):
        write_config(run, in_parts, "any")
    start_at(parts_later, alone, 8)
    train_by_two(tmp_path, tmp_path / "join", parts, parts_later)
    assert_like(parts, alone)
    assert_like(parts_later, alone)
    alone_later.mkdir()
    start_at(alone_later, parts, 4)
    train_alone(tmp_path, alone_later, config)
    assert_like(alone_later, alone)


def test_two_workers_train_in_eight_bits_as_one_does(tmp_path: Path) -> None:
    """Wide enough for it, with ddp and fsdp. Rounded in other batches, the curve is only near that of one."""
    config = tiny_run_config(write_tiny_database(tmp_path, vocab_size=400), precision="int8", num_steps=4)
    wide = {"hidden_dim": 384, "num_heads": 6, "head_dim": 64, "ffn_dim": 384, "num_chunks": 32}
    of_encoder = {"encoder_dim": 384, "encoder_heads": 6, "encoder_ffn_dim": 384}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **wide, **of_encoder))
    train_alone(tmp_path, tmp_path / "alone", config)
    runs = [tmp_path / parallel for parallel in ("ddp", "fsdp")]
    for run in runs:
        training = dataclasses.replace(config.training, parallel=run.name)
        write_config(run, dataclasses.replace(config, training=training), "any")
    train_by_two(tmp_path, tmp_path / "join", *runs)
    curves = [
        [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        for run in (tmp_path / "alone", *runs)
    ]
    assert len(curves[0]) == 4
    assert curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-2)
