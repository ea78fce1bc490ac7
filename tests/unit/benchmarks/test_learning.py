"""How benchmarks/learning.py divides its work, and what it makes of the scores."""

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.learning import Learning, LearningBenchmark, Task, work_on
from benchmarks.learning_metrics import corpus_metrics, update_metrics
from benchmarks.learning_plan import Plan
from benchmarks.learning_scoring import Scoring
from retro_ray.database.format import write_json_atomically
from retro_ray.errors import ConfigError


@dataclass(frozen=True)
class Writing:
    """A job that writes a file, if the file of another one is there."""

    path: Path
    after: Path | None = None
    status: int = 0

    @property
    def is_done(self) -> bool:
        return self.path.exists()

    def start(self, until: float) -> subprocess.Popen[bytes]:
        if self.after is not None:
            assert self.after.exists()
        work = f"import sys; open({str(self.path)!r}, 'a').write('x'); sys.exit({self.status})"
        return subprocess.Popen([sys.executable, "-c", work])


def test_tasks_wait_for_what_they_need_and_are_done_once(tmp_path: Path) -> None:
    first, second = Writing(tmp_path / "1"), Writing(tmp_path / "2", after=tmp_path / "1")
    tasks = [Task(second, (first,)), Task(first)]
    for _ in range(2):
        assert work_on(tasks, 2, math.inf)
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text() == "x"


def test_nothing_begins_when_the_time_is_over_and_a_failure_is_told(tmp_path: Path) -> None:
    job = Writing(tmp_path / "1")
    assert not work_on([Task(job)], 2, time.time())
    assert not job.is_done
    with pytest.raises(ConfigError, match="ended with status 3"):
        work_on([Task(Writing(tmp_path / "2", status=3))], 1, math.inf)


def test_without_time_nothing_is_begun_and_nothing_is_claimed(tmp_path: Path) -> None:
    learning = Learning(LearningBenchmark(data=tmp_path, cache=tmp_path / "cache"), until=time.time())
    assert not learning.work()
    assert learning.metrics() == {}
    assert not (tmp_path / "cache").exists()


def test_metrics_are_of_the_scores_that_there_are(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "corpus", 1500)
    scores = {
        "baseline-0": {"off": 1.0},
        "default-0": {"off": 1.02, "on": 0.9, "random": 1.03},
        "baseline-1": {"off": 1.0},
        "default-1": {"off": 1.04, "on": 0.8},
        "longer-1": {"off": 0.8},
        "fitted-1": {"off": 0.8, "on": 0.6},
    }
    metrics = corpus_metrics(plan, range(3), lambda run, home: scores.get(run.run, {}))
    assert metrics["gain_on_over_baseline_seeds"] == pytest.approx([0.1, 0.2])
    assert metrics["gain_on_over_baseline"] == pytest.approx(0.15)
    assert metrics["loss_off_over_baseline"] == pytest.approx(0.03)
    assert metrics["random_gain"] == pytest.approx(1 - 1.03 / 1.02)
    assert metrics["retrofit_gain"] == pytest.approx(0.25)
    assert metrics["retrofit_off_difference"] == 0
    assert not any("paper" in name for name in metrics)
    updated = {"default-0": {"on": 0.6}}
    homes = {plan.home: scores, tmp_path / "updated": updated}
    metrics = update_metrics(plan, tmp_path / "updated", range(2), lambda run, home: homes[home].get(run.run, {}))
    assert metrics["gain_updated_over_baseline_seeds"] == pytest.approx([0.4])


def test_scores_are_kept_by_the_database_that_is_retrieved_from(tmp_path: Path) -> None:
    scoring = Scoring(database=tmp_path, folder=Path("runs/default-0"), modes=("off", "on-1"))
    (tmp_path / "scores").mkdir()
    write_json_atomically(tmp_path / "scores" / "default-0.json", {"off": [math.log(2), 2]})
    assert scoring.bits_per_byte == {"off": pytest.approx(0.5)}
    assert not scoring.is_done
