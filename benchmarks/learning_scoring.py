"""Bits per byte of one run of benchmarks/learning.py on all held-out documents, in a process of one thread.

What was scored is kept in HOME/scores/RUN.json of the database that is retrieved from, one mode after the other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning_process import do, start_process
from retro_ray.database.format import write_json_atomically
from retro_ray.database.store import Database


@dataclass(frozen=True)
class Scoring:
    """Score a run with one database, in some modes: off, on, random, or on with another number of neighbours, on-1."""

    database: Path
    """Home of the database that is retrieved from."""
    folder: Path
    """Of the run."""
    modes: tuple[str, ...]

    @property
    def _path(self) -> Path:
        return self.database / "scores" / f"{self.folder.name}.json"

    @property
    def nats(self) -> dict[str, tuple[float, int]]:
        """Nats and bytes of the modes that are scored."""
        if not self._path.exists():
            return {}
        return {mode: tuple(value) for mode, value in json.loads(self._path.read_text(encoding="utf-8")).items()}

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Of the modes that are scored."""
        return {mode: nats / (math.log(2) * num_bytes) for mode, (nats, num_bytes) in self.nats.items()}

    @property
    def is_done(self) -> bool:
        """Whether all modes are."""
        return set(self.modes) <= set(self.nats)

    def start(self, until: float) -> subprocess.Popen[bytes]:
        """Score in a process of its own what is not scored, beginning with no mode after a time."""
        return start_process("benchmarks.learning_scoring", {**dataclasses.asdict(self), "until": until})

    def score(self, until: float) -> None:
        """The same, here."""
        from retro_ray.evaluation.bits_per_byte import choose_documents, score_documents
        from retro_ray.evaluation.current_neighbours import validation_text
        from retro_ray.evaluation.own_text import first_neighbours
        from retro_ray.training.checkpoint import load_model

        database = Database.open(self.database)
        model, config, _ = load_model(self.folder, database.manifest)
        for mode in self.modes:
            if mode in self.nats or time.time() > until:
                continue
            name, _, number = mode.partition("-")
            count = int(number) if number else config.model.num_neighbours
            text = validation_text(database, count)
            store, source = text.open(database.chunk_length), text.neighbours
            assert source is not None
            score = score_documents(
                model,
                store,
                database,
                choose_documents(store, store.num_chunks),
                mode=name,  # pyright: ignore[reportArgumentType]
                num_neighbours=count,
                neighbours=first_neighbours(source, count),
            )
            self._path.parent.mkdir(exist_ok=True)
            write_json_atomically(self._path, {**self.nats, mode: [score.nats, score.num_bytes]})
            print(f"{self.folder.name} in {self.database.name}: {mode} {score.value:.4f}", flush=True)


def _score(told: dict[str, Any]) -> None:
    Scoring(Path(told["database"]), Path(told["folder"]), tuple(told["modes"])).score(told["until"])


if __name__ == "__main__":
    do(_score)
