"""Training on a real Ray cluster: workers joined by DDP, killed processes, the command line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from retro_ray.errors import RetroRayError
from retro_ray.training.checkpoint import list_checkpoints, load_model
from retro_ray.training.loop import fit
from retro_ray.training.progress import read_metrics
from retro_ray.training.trainer import Trainer, TrainingJob
from tests.fakes import tiny_run_config, write_tiny_database

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_tiny_database(home)
    return home


def job_of(home: Path, run: Path, **training) -> TrainingJob:
    from retro_ray.database.store import Database

    return TrainingJob(home=home, run_directory=run, config=tiny_run_config(Database.open(home), **training))


def rows_of(run: Path) -> list[dict]:
    """What a run wrote, without its timings."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def wait_for(condition, timeout_s: float = 180.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)
    return found


def training_processes() -> list[psutil.Process]:
    """The training workers of this test's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def with_one_thread(job: TrainingJob) -> None:
    """Train in this process, undisturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Trainer(job, torch.device("cpu"), say=lambda line: None).run()
    torch.set_num_threads(threads)


def test_two_workers_of_which_one_is_killed_give_the_curve_of_one_process(home, tmp_path):
    settings = {"num_steps": 40, "checkpoint_every": 10, "evaluate_every": 20, "learning_rate": 1e-3}
    alone = job_of(home, tmp_path / "alone", **settings)
    with_one_thread(alone)

    job, lines = job_of(home, tmp_path / "workers", **settings), []

    def kill_one() -> None:
        wait_for(lambda: list_checkpoints(job.run_directory))
        killed.append(training_processes()[-1])
        killed[0].send_signal(signal.SIGKILL)

    killed: list[psutil.Process] = []
    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = fit(job, num_workers=2, use_gpu=False, say=lines.append)
    killer.join()

    assert killed, "a worker was killed in the middle"
    assert any(line.startswith("continuing from step ") for line in lines)
    assert not any(line.startswith("continuing from step 40") for line in lines)
    assert outcome.steps == 40
    ours, reference = rows_of(job.run_directory), rows_of(alone.run_directory)
    assert [row["step"] for row in ours] == [row["step"] for row in reference]
    for a, b in zip(ours, reference, strict=True):
        assert a == pytest.approx(b, rel=1e-3), "two workers share the batches of one"


def test_an_error_that_a_user_can_mend_is_one_line_and_is_not_tried_again(home, tmp_path):
    job = job_of(home, tmp_path, num_steps=5, num_warmup_steps=0)
    model = dataclasses.replace(job.config.model, num_neighbours=9)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, model=model))
    with pytest.raises(RetroRayError) as caught:
        fit(job, num_workers=1, use_gpu=False, say=lambda line: None)
    assert str(caught.value).startswith("--num-neighbours is 9, the database stores 4 per chunk")
    assert "\n" not in str(caught.value)


def start(home: Path, address: str, *flags: str) -> subprocess.Popen:
    """jobs/train.py as a program, on the tests' cluster."""
    command = [sys.executable, str(REPOSITORY / "jobs" / "train.py"), "--home", str(home), "--json", *flags]
    return subprocess.Popen(
        command,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_job_killed_and_resumed_gives_the_rows_of_an_undisturbed_one(one_cpu, ray_cluster, tmp_path):
    database = write_tiny_database(tmp_path)
    flags = ["--num-workers=1", "--steps=40", "--checkpoint-every=10", "--evaluate-every=25", "--precision=fp32"]
    run = tmp_path / "runs" / "default"

    job = start(tmp_path, ray_cluster, *flags)
    wait_for(lambda: list_checkpoints(run))
    job.kill()
    for process in training_processes():
        process.kill()  # or it would train on until Ray notices that the job is gone
    job.communicate()
    assert len([row for row in rows_of(run) if "loss" in row]) < 40, "it was killed in the middle"
    wait_for(lambda: not training_processes())

    resumed = start(tmp_path, ray_cluster, *flags, "--resume")
    output, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert "continuing from step 10" in errors
    result = json.loads(output)
    assert (result["steps"], result["run"]) == (40, str(run))
    assert 0 < result["validation_bpb_on"] < 8

    _, config, meta = load_model(run, database.manifest)
    assert meta.step == 40
    undisturbed = TrainingJob(home=tmp_path, run_directory=tmp_path / "undisturbed", config=config)
    with_one_thread(undisturbed)
    assert rows_of(run) == rows_of(undisturbed.run_directory)


def test_the_command_line_names_a_user_error_in_one_line(tmp_path):
    command = [sys.executable, str(REPOSITORY / "jobs" / "train.py"), "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no retrieval database in {tmp_path}")
    assert len(done.stderr.splitlines()) == 1
