"""What does retrieval give a small model, at equal tokens and at equal time, and when its database is updated?

About 4 million weights and 3 million tokens, trained on a corpus without chunked cross-attention, with the paper's
start of it and with the recipe's, and scored on held-out documents; some seeds of each. Then newer versions of the
held-out documents are added to the database and nothing is trained; then a baseline that was trained longer is fitted.
The same with a third of the steps on python-docs, which needs no data.

All of it takes one to two hours on two cores, in pieces of an hour (--minutes): databases, checkpoints and scores are
kept in --cache, and the next start goes on with what is missing. What is not done yet is not in the metrics.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from benchmarks.learning_metrics import Scores, corpus_metrics, python_docs_metrics, update_metrics
from benchmarks.learning_plan import TOKENIZER, Plan
from benchmarks.learning_plots import plot_curves, plot_spread
from benchmarks.learning_scoring import Scoring
from benchmarks.learning_training import TrainingRun
from retro_ray.building.reading import CorpusReader
from retro_ray.command_line import parse, run
from retro_ray.config import CorpusConfig
from retro_ray.database.format import database_directory
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError, RetroRayError

Stage = Literal["index", "cost", "train", "update", "retrofit", "python-docs"]
_STAGES: tuple[Stage, ...] = ("index", "cost", "train", "update", "retrofit", "python-docs")
_MODES = ("off", "on", "random")
_LEAST_S = 20.0
"""Of time left for a process to be started."""


@dataclass(frozen=True, kw_only=True)
class LearningBenchmark:
    """Bits per byte of baselines and RETRO on held-out documents, with their spread over seeds."""

    data: Path | None = None
    """Folder of corpora, one per sub-folder. Without it, python-docs alone."""
    corpus: str = "aws-cfn-2019"
    """Sub-folder of --data to train on."""
    updated: str | None = "aws-cfn-2023"
    """Sub-folder with newer versions of the same documents, with the same ids; `None` for no update."""
    num_seeds: int = 2
    steps: int = 1500
    """Of 2,048 tokens; python-docs gets a third of them."""
    rerank: Literal["none", "overlap"] = "overlap"
    """How the databases choose neighbours; see jobs/index.py --rerank."""
    stage: tuple[Stage, ...] = _STAGES
    """Do these alone; the metrics are of all that is done."""
    minutes: float | None = 60
    """Stop after so many, or a little later; the next start goes on. `None`: when all is done."""
    num_processes: int = os.cpu_count() or 1
    """Of one thread each, that train and score at the same time."""
    cache: Path = Path("results/learning")
    """Where databases, runs and scores are kept."""
    json: Path | None = None
    """Write the metrics to this file, and plots beside it."""


class Job(Protocol):
    """Work that goes on in a process of its own where it was."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        ...

    def start(self, until: float) -> subprocess.Popen[bytes]:
        """Go on until about a time."""
        ...


@dataclass(frozen=True)
class Task:
    """A job, and those that must be done before."""

    job: Job
    needs: tuple[Job, ...] = ()


def work_on(tasks: Sequence[Task], num_processes: int, until: float) -> bool:
    """Do tasks side by side, in their order where they may, until about a time; returns whether all are done.

    Raises:
        ConfigError: a process failed.
    """
    waiting = [task for task in tasks if not task.job.is_done]
    running: list[tuple[Task, subprocess.Popen[bytes]]] = []
    while True:
        for task, process in running:
            if process.poll():
                raise ConfigError(f"{task.job} ended with status {process.returncode}; see above")
        running = [(task, process) for task, process in running if process.poll() is None]
        ready = [task for task in waiting if all(need.is_done for need in task.needs)]
        for task in ready[: num_processes - len(running)]:
            if time.time() < until - _LEAST_S:
                waiting.remove(task)
                running.append((task, task.job.start(until)))
        if not running:
            return all(task.job.is_done for task in tasks)
        time.sleep(0.2)


class Learning:
    """The databases that are trained on, the runs, and what has been measured so far.

    Args:
        benchmark: the settings.
        until: when to stop.
    """

    def __init__(self, benchmark: LearningBenchmark, until: float) -> None:
        self._settings, self._until = benchmark, until
        cache = benchmark.cache.expanduser().absolute()
        self._corpus = None if benchmark.data is None else Plan(cache / benchmark.corpus, benchmark.steps)
        self._updated_home = cache / f"{benchmark.corpus}-with-{benchmark.updated}"
        self._docs = Plan(cache / "python-docs", max(1, benchmark.steps // 3))
        self._seeds = range(benchmark.num_seeds)

    def work(self) -> bool:
        """Do what is missing, a seed's runs of all kinds before the next seed's; returns whether the time sufficed."""
        settings, plan = self._settings, self._corpus
        if settings.data is not None and plan is not None:
            source = settings.data / settings.corpus
            self._do("index", lambda: self._index(plan.home, str(source)))
            self._do("cost", lambda: self._work([Task(one) for one in plan.timed()]))
            if settings.updated is not None:
                newer = settings.data / settings.updated
                self._do("update", lambda: self._add_newer(plan.home, newer))
        self._do("python-docs", lambda: self._index(self._docs.home, "python-docs"))
        self._do("python-docs", lambda: self._work([Task(one) for one in self._docs.timed()]))
        return self._work([task for seed in self._seeds for task in self._tasks(seed)])

    def metrics(self) -> dict[str, Any]:
        """Of all that is done."""
        metrics, plan = {}, self._corpus
        if plan is not None:
            metrics |= corpus_metrics(plan, self._seeds, self._scores)
            metrics |= update_metrics(plan, self._updated_home, self._seeds, self._scores)
        return metrics | python_docs_metrics(self._docs, self._seeds, self._scores)

    def plot(self, metrics: dict[str, Any], path: Path) -> None:
        """Pictures of the corpus, beside a file of metrics."""
        if self._corpus is not None:
            plot_curves(self._corpus, self._seeds, path.with_name(f"{path.stem}-curves.png"))
            plot_spread(metrics, path.with_name(f"{path.stem}-seeds.png"))

    def _do(self, stage: Stage, work: Callable[[], object]) -> None:
        if stage in self._settings.stage and time.time() < self._until:
            print(f"== {stage}", flush=True)
            work()

    def _work(self, tasks: Sequence[Task]) -> bool:
        return work_on(tasks, self._settings.num_processes, self._until)

    def _index(self, home: Path, source: str) -> None:
        try:
            Database.open(home)
        except RetroRayError:
            rerank = self._settings.rerank
            _call("jobs/index.py", "--home", str(home), "--input", source, "--tokenizer", TOKENIZER, "--rerank", rerank)

    def _add_newer(self, home: Path, source: Path) -> None:
        """Newer versions of the held-out documents, in a copy of the database."""
        updated = self._updated_home
        if (updated / "scores").exists():
            return
        shutil.rmtree(updated, ignore_errors=True)
        shutil.copytree(database_directory(home), database_directory(updated))
        documents = updated / "newer.jsonl"
        count = write_newer(Database.open(updated), source, documents)
        print(f"{count} held-out documents have a newer version", flush=True)
        _call("-m", "retro_ray", "add", str(documents), "--home", str(updated))
        (updated / "scores").mkdir()

    def _tasks(self, seed: int) -> list[Task]:
        """What one seed asks for, in the stages that were asked for."""
        tasks, stages = [], self._settings.stage
        if (plan := self._corpus) is not None:
            default, longer = plan.default(seed), plan.longer(seed)
            if "train" in stages:
                tasks += self._trained(plan.home, plan.baseline(seed), default)
            if "update" in stages and (self._updated_home / "scores").exists():
                tasks.append(Task(self._scoring(default, self._updated_home, ("on", "on-1")), (default,)))
            if "train" in stages:
                tasks += self._trained(plan.home, plan.paper(seed))
            if "retrofit" in stages:
                tasks += self._trained(plan.home, longer)
                tasks += self._trained(plan.home, plan.fitted(seed), needs=(longer,))
        if "python-docs" in stages:
            docs = self._docs
            tasks += self._trained(docs.home, docs.baseline(seed), docs.default(seed))
            if (cost := docs.cost) is not None:
                tasks += self._trained(docs.home, docs.equal_time(seed, cost))
        return tasks

    def _trained(self, home: Path, *runs: TrainingRun, needs: tuple[Job, ...] = ()) -> list[Task]:
        """Runs, and their scores."""
        return [task for one in runs for task in (Task(one, needs), Task(self._scoring(one, home), (one,)))]

    def _scoring(self, one: TrainingRun, home: Path, modes: tuple[str, ...] = _MODES) -> Scoring:
        has_retrieval = one.model.get("cca_layers") != ()
        return Scoring(database=home, folder=one.folder, modes=modes if has_retrieval else ("off",))

    def _scores(self, one: TrainingRun, home: Path) -> Scores:
        return self._scoring(one, home).bits_per_byte


def write_newer(database: Database, corpus: Path, path: Path) -> int:
    """Write the documents of `corpus` that have the id of a held-out one, as JSON lines; returns how many.

    Raises:
        ConfigError: there are none.
    """
    store = database.validation
    held_out = set() if store is None else {store.document_ref(number).id for number in range(store.num_documents)}
    found = [one for one in CorpusReader(CorpusConfig(input=(str(corpus),))) if one.id in held_out]
    if not found:
        raise ConfigError(f"no document of {corpus} has the id of a held-out one: name another --updated, or None")
    lines = [json.dumps({"id": one.id, "title": one.title, "text": one.text}) + "\n" for one in found]
    path.write_text("".join(lines), encoding="utf-8")
    return len(found)


def _call(*command: str) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, *command], env=environment, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with status {done.returncode}; see above")


def main(benchmark: LearningBenchmark) -> None:
    """Measure and report."""
    until = time.time() + 60 * benchmark.minutes if benchmark.minutes is not None else float("inf")
    learning = Learning(benchmark, until)
    if not learning.work():
        print("the time is over: start it again, and it goes on where it is", file=sys.stderr)
    metrics = learning.metrics()
    for name, value in metrics.items():
        print(f"{name:>36}  {value:.4f}" if isinstance(value, float) else f"{name:>36}  {value}")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        learning.plot(metrics, benchmark.json)


if __name__ == "__main__":
    parsed = parse(LearningBenchmark, "python -m benchmarks.learning")
    run(lambda: main(parsed))
