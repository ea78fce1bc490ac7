"""`python -m retro_ray report`: one page on a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from retro_ray.config import default_home


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page, and the same as JSON: scores, leakage, sweeps, updates, examples, settings.

    What jobs/evaluate.py found is taken from RUN/evaluation/. What is not there, or is of an older checkpoint or
    database, is evaluated first.
    """

    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    run_name: Annotated[str, tyro.conf.arg(name="run")] = "default"
    """Run to report on."""
    output: Path | None = None
    """The page. Default: RUN/report.html; the JSON file is written beside it."""
    baseline: Path | None = None
    """Model to compare with where scores are missing: folder of a checkpoint, of a run, or of a home."""
    max_chunks: int | None = None
    """Where something is missing, score about so many chunks. Default: the whole validation split."""

    def run(self) -> None:
        from retro_ray.database.store import Database
        from retro_ray.evaluation.report import collect, is_current, write_report
        from retro_ray.evaluation.results import read_result
        from retro_ray.training.run_folder import run_directory

        home = self.home.expanduser().absolute()
        database, run = Database.open(home), run_directory(home, self.run_name)
        needed = ("scores", "examples", "near_duplicates", "sweep")
        if not all(is_current(read_result(run, kind), run, database) for kind in needed):
            self._evaluate(home)
        output = (self.output or run / "report.html").absolute()
        beside = write_report(collect(run, database), database, output)
        print(output)
        print(beside)

    def _evaluate(self, home: Path) -> None:
        from retro_ray.evaluation.record import record
        from retro_ray.evaluation.subject import open_subject
        from retro_ray.ray_session import connect

        connect()
        with open_subject(home, self.run_name, max_chunks=self.max_chunks) as subject:
            record(
                subject,
                baseline=self.baseline,
                near_duplicates=True,
                axes=("k", "share", "nprobe", "parts", "rerank"),
            )
