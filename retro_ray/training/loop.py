"""Training on Ray: one `Trainer` per Ray Train worker, joined by torch's process group.

Ray Train starts the workers, sets up the process group, and starts all of them again when one
dies; each start continues from the newest whole checkpoint of the run.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.errors import ConfigError, RetroRayError
from retro_ray.ray_session import num_free
from retro_ray.training.trainer import Trainer, TrainingJob, TrainingOutcome

_MAX_CPU_WORKERS = 8
_MAX_WORKER_FAILURES = 3
_MAX_START_FAILURES = 10  # of a minute each, when the cluster is busy
_POLL_S = 0.5


class NoticeBoard:
    """Where workers leave what the driver is to know; an actor of its own, so that it outlives them."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: str | None = None

    def say(self, line: str) -> None:
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def fail(self, message: str) -> None:
        """Note an error that another attempt would meet again."""
        self._failure = self._failure or message

    def failure(self) -> str | None:
        return self._failure


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What each worker runs; worker 0's value is the run's. None if an earlier attempt failed for good."""
    board = settings["board"]
    if ray.get(board.failure.remote()) is not None:
        return None
    if settings["num_threads"]:
        torch.set_num_threads(settings["num_threads"])
    try:
        outcome = Trainer(settings["job"], get_device(), say=board.say.remote).run()
    except RetroRayError as error:
        # Ray Train restarts failed workers. The next attempt sees this and ends at once.
        ray.get(board.fail.remote(str(error)))
        raise
    return dataclasses.asdict(outcome)


def choose_workers(num_workers: int | None, use_gpu: bool, batch_size: int) -> int:
    """How many workers a run gets: `num_workers` if the cluster can hold them, else as many as suit it.

    By default one per GPU; without GPUs one per CPU, up to 8: several workers of one thread are faster than
    one of several threads while a model is small.

    Raises:
        ConfigError: the cluster is too small.
    """
    kind = "GPU" if use_gpu else "CPU"
    total = int(ray.cluster_resources().get(kind, 0))
    if use_gpu and total == 0:
        raise ConfigError("--use-gpu is yes, but the Ray cluster has no GPU: use --use-gpu no, or another cluster")
    if num_workers is None:
        free = max(1, num_free(kind))
        return min(free, batch_size) if use_gpu else min(free, batch_size, _MAX_CPU_WORKERS)
    if not 1 <= num_workers <= max(1, total):
        raise ConfigError(f"--num-workers is {num_workers}, the Ray cluster has {total} {kind}s: use 1 to {total}")
    if num_workers > batch_size:
        raise ConfigError(
            f"--num-workers is {num_workers}, more than --batch-size {batch_size}: lower it or raise that"
        )
    return num_workers


def fit(job: TrainingJob, *, num_workers: int, use_gpu: bool, say: Callable[[str], None]) -> TrainingOutcome:
    """Train on the Ray cluster that this process is connected to.

    Args:
        job: what to train.
        num_workers: data-parallel workers.
        use_gpu: one GPU for each of them.
        say: gets lines of progress.

    Raises:
        RetroRayError: training failed; the message says why, in one line.
    """
    # A GPU's worker computes on the GPU: torch's choice of threads will do.
    cpus_per_worker = 1 if use_gpu else max(1, num_free("CPU") // num_workers)
    board: Any = ray.remote(NoticeBoard).options(num_cpus=0).remote()
    scratch = job.run_directory / "ray"
    shutil.rmtree(scratch, ignore_errors=True)
    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    settings = {"job": job, "board": board, "num_threads": 0 if use_gpu else cpus_per_worker}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=scratch.name,
            storage_path=str(scratch.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=_MAX_WORKER_FAILURES, controller_failure_limit=_MAX_START_FAILURES
            ),
            worker_runtime_env={"env_vars": FAST_ALLOCATOR_ENV},
        ),
    )
    with _repeating_lines(board, say):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise RetroRayError(f"training failed: {_first_cause(error)}; continue with --resume") from error
        except SystemExit:  # Ray Train's answer to Ctrl-C, with a status that says success
            raise RetroRayError("training was interrupted: continue with --resume") from None
    failure = ray.get(board.failure.remote())
    if failure is not None:
        raise RetroRayError(failure)
    if result.return_value is None:
        raise RetroRayError("training was stopped before its end: continue with --resume")
    return TrainingOutcome(**result.return_value)


@contextmanager
def _repeating_lines(board: Any, say: Callable[[str], None]) -> Iterator[None]:
    """Passes the workers' lines to `say` while the block runs."""
    stopping = threading.Event()

    def repeat() -> None:
        while True:
            stopped = stopping.wait(_POLL_S)
            for line in ray.get(board.take_lines.remote()):
                say(line)
            if stopped:
                return

    thread = threading.Thread(target=repeat, name="progress-lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _first_cause(error: TrainingFailedError) -> str:
    """What went wrong first, in one line: when a worker dies, the others fail as well, of its silence."""
    if isinstance(error, ControllerError):
        return _one_line(error.controller_failure)
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    if not failures:
        return _one_line(error)
    echoes = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    causes = {rank: e for rank, e in failures.items() if not any(echo in str(e) for echo in echoes)}
    rank, cause = min((causes or failures).items(), key=lambda item: item[0])
    return f"worker {rank}: {_one_line(cause)}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    # Ray passes a traceback's text on as the message; its last line names the error itself.
    return text if re.match(r"[\w.]+(Error|Exception)\b", text) else f"{type(error).__name__}: {text}"
