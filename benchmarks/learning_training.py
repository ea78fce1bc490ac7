"""One training run of benchmarks/learning.py, in a process of one thread: continued where it was, and stopped behind a
checkpoint when its time is over.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.learning_process import do, start_process
from retro_ray.database.format import write_json_atomically
from retro_ray.database.store import Database
from retro_ray.training.retrofit import fitting_config, load_base, write_start
from retro_ray.training.run_folder import locked, new_config, resumed_config, run_directory, write_config
from retro_ray.training.trainer import Trainer, TrainingJob

OUTCOME_NAME = "outcome.json"
"""In the folder of a run that is done."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Train one run, or continue it."""

    home: Path
    """Of the database and the run."""
    run: str
    """Name of the run."""
    recipe: str = "tiny"
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of `ModelConfig` that replace the recipe's."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of `TrainingConfig` that replace the recipe's."""
    base: str | None = None
    """Another run, whose decoder is frozen and fitted."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return run_directory(self.home, self.run)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Steps, bits per byte of the last validation, tokens per second; None while it is not done."""
        path = self.folder / OUTCOME_NAME
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its end."""
        return self.outcome is not None

    def start(self, until: float) -> subprocess.Popen[bytes]:
        """Continue it in a process of its own until a time (of time.time()), or to its end."""
        return start_process("benchmarks.learning_training", {**dataclasses.asdict(self), "until": until})

    def train(self, until: float) -> None:
        """The same, here."""
        import torch

        folder, manifest = self.folder, Database.open(self.home).manifest
        with locked(folder):
            if (folder / "config.json").exists():
                config = resumed_config(folder, None, {}, {})
            elif self.base is not None:
                name = str(run_directory(self.home, self.base))
                base = load_base(name, manifest)
                config = fitting_config(name, base, manifest, self.model, self.training)
                write_start(folder, config, base.weights, manifest)
            else:
                config = new_config(self.recipe, manifest, self.model, self.training)
            write_config(folder, config, manifest.version)
            job = TrainingJob(home=self.home, run_directory=folder, config=config)
            trainer = Trainer(job, torch.device("cpu"), say=self._say)
            outcome = trainer.run(stop=lambda: time.time() > until)
            if outcome.steps == config.training.num_steps:
                result = {"steps": outcome.steps, **outcome.validation, "tokens_per_s": outcome.tokens_per_second}
                write_json_atomically(folder / OUTCOME_NAME, result)

    def _say(self, line: str) -> None:
        print(f"{self.home.name} {self.run}: {line}", flush=True)


def _train(told: dict[str, Any]) -> None:
    until = told.pop("until")
    # Layers are tuples, which JSON has not.
    told["model"] = {name: tuple(x) if isinstance(x, list) else x for name, x in told["model"].items()}
    TrainingRun(**{**told, "home": Path(told["home"])}).train(until)


if __name__ == "__main__":
    do(_train)
