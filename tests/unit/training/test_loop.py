import pytest
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from retro_ray import ray_session
from retro_ray.errors import ConfigError
from retro_ray.training import loop
from retro_ray.training.loop import NoticeBoard, choose_workers


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (
            WorkerGroupError("...", {0: RuntimeError("[gloo] Connection closed by peer"), 1: MemoryError("too large")}),
            "worker 1: MemoryError: too large",
        ),
        (
            WorkerGroupError(
                "...", {0: RuntimeError("Traceback (most recent call last):\n  File x\nOSError: disk full")}
            ),
            "worker 0: OSError: disk full",
        ),
        (
            WorkerGroupError("...", {1: RuntimeError("Connection reset by peer")}),
            "worker 1: RuntimeError: Connection reset by peer",
        ),
        (ControllerError(TimeoutError("no CPUs for 60 s")), "TimeoutError: no CPUs for 60 s"),
    ],
)
def test_the_cause_of_a_failed_run_is_one_line_and_no_echo(error, want):
    assert loop._first_cause(error) == want


class Cluster:
    """Says each time what is free, and the last of it from then on."""

    def __init__(self, total: dict, *free: dict) -> None:
        self.total, self.free = total, list(free)

    def cluster_resources(self) -> dict:
        return self.total

    def available_resources(self) -> dict:
        return self.free.pop(0) if len(self.free) > 1 else self.free[0]


def answer(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, settling_s: float = 0.0) -> None:
    monkeypatch.setattr(loop, "ray", cluster)
    monkeypatch.setattr(ray_session, "ray", cluster)
    monkeypatch.setattr(ray_session, "_SETTLING_S", settling_s)


@pytest.mark.parametrize(
    ("total", "free", "use_gpu", "batch_size", "want"),
    [
        ({"CPU": 2.0}, {"CPU": 2.0}, False, 4, 2),
        ({"CPU": 64.0}, {"CPU": 64.0}, False, 256, 8),
        ({"CPU": 8.0}, {"CPU": 7.5}, False, 4, 4),
        ({"CPU": 2.0}, {}, False, 4, 1),
        ({"CPU": 64.0, "GPU": 16.0}, {"CPU": 64.0, "GPU": 16.0}, True, 256, 16),
    ],
)
def test_workers_by_default(monkeypatch, total, free, use_gpu, batch_size, want):
    answer(monkeypatch, Cluster(total, free))
    assert choose_workers(None, use_gpu, batch_size) == want


def test_what_has_just_ended_is_free(monkeypatch):
    """Ray says so a moment later."""
    answer(monkeypatch, Cluster({"CPU": 2.0}, {}, {"CPU": 1.0}, {"CPU": 2.0}), settling_s=60.0)
    assert choose_workers(None, False, 4) == 2


def test_workers_asked_for_must_fit_cluster_and_batch(monkeypatch):
    answer(monkeypatch, Cluster({"CPU": 4.0}, {"CPU": 4.0}))
    assert choose_workers(3, False, 4) == 3
    for num_workers in (0, 5):
        with pytest.raises(ConfigError, match=f"--num-workers is {num_workers}, the Ray cluster has 4 CPUs"):
            choose_workers(num_workers, False, 8)
    with pytest.raises(ConfigError, match="--num-workers is 3, more than --batch-size 2"):
        choose_workers(3, False, 2)
    with pytest.raises(ConfigError, match="the Ray cluster has no GPU"):
        choose_workers(None, True, 8)


def test_lines_are_taken_once_and_the_first_failure_stays():
    board = NoticeBoard()
    board.say("a")
    board.say("b")
    assert (board.take_lines(), board.take_lines()) == (["a", "b"], [])
    assert board.failure() is None
    board.fail("first")
    board.fail("second")
    assert board.failure() == "first"
