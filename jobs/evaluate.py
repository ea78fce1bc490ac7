#!/usr/bin/env python3
"""Score a trained model on held-out documents, or on documents of one's own: bits per byte and perplexities with
retrieval on, off, and random, and how much of the gain is copying.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retro_ray.command_line import parse, run
from retro_ray.config import CorpusConfig, RecordConfig, default_home
from retro_ray.errors import ConfigError, RetroRayError

if TYPE_CHECKING:
    from retro_ray.database.store import Database
    from retro_ray.evaluation.subject import Subject


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Score the newest checkpoint of a run on the validation split of the database, or on --input.

    What is found is kept in RUN/evaluation/ for `python -m retro_ray report`. Scores are kept, too: a job that was
    killed goes on where it was.
    """

    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    run: str = "default"
    """Run whose newest checkpoint is scored."""
    input: tuple[str, ...] = ()
    """Files, folders and globs of documents to score in place of the validation split; see jobs/index.py --input. They
    are embedded on this machine and put into no database."""
    records: RecordConfig = field(default_factory=RecordConfig)
    baseline: Path | None = None
    """Score this model beside it, without retrieval: folder of a checkpoint, of a run, or of a home."""
    near_duplicates: bool = False
    """List the documents of which the database has nearly the same one: all of its text is read."""
    sweep: tuple[Literal["k", "share", "nprobe", "parts", "rerank"], ...] = ()
    """Score along these, too: number of neighbours, random shares of the database, lists that an index visits (or rows
    of a graph that it keeps in view), what of the neighbours is shown, reranking."""
    after: Path | None = None
    """Home of a database after an update: score the checkpoint with its neighbours, and with those of the state before
    it, in place of all else."""
    before: Path | None = None
    """Home of that state. Default: the database of --after as it was built, without its edits."""
    questions: Path | None = None
    """Answer the questions of this file, in SQuAD's format, in place of all else: exact match and F1."""
    passages: Literal["given", "retrieved"] = "given"
    """Answer them with the paragraphs of that file, or with what the database has for each."""
    num_neighbours: int | None = None
    """Neighbours per chunk. Default: as many as in training."""
    max_chunks: int | None = None
    """Score about so many chunks, of documents chosen at random. Default: the whole split."""
    num_workers: int | None = None
    """Processes. Default: one per GPU, else one per CPU."""
    json: Path | None = None
    """Write the result to this file as one JSON object."""


def main(job: EvaluateJob) -> None:
    """Evaluate, then print tables."""
    from retro_ray.evaluation.subject import open_subject
    from retro_ray.ray_session import connect

    if job.before is not None and job.after is None:
        raise ConfigError("--before is given without --after: name the home of the state after the update, too")
    if job.questions is not None:
        _finish(job, _answers(job, job.questions))
        return
    connect()
    before, after = _databases(job)
    with open_subject(
        job.home.expanduser().absolute(),
        job.run,
        corpus=CorpusConfig(input=job.input, **dataclasses.asdict(job.records)) if job.input else None,
        num_neighbours=job.num_neighbours,
        max_chunks=job.max_chunks,
        database=before,
    ) as subject:
        result = _scores(job, subject) if before is None or after is None else _update(job, subject, before, after)
    _finish(job, result)


def _finish(job: EvaluateJob, result: dict[str, Any]) -> None:
    from retro_ray.evaluation.results import as_json

    if job.json is not None:
        job.json.write_text(json.dumps(as_json(result), indent=2) + "\n", encoding="utf-8")


def _databases(job: EvaluateJob) -> tuple[Database | None, Database | None]:
    """The two states to compare; the first is the one whose validation split is scored."""
    from retro_ray.database.store import Database
    from retro_ray.evaluation.update import as_built

    if job.after is None:
        return None, None
    after = Database.open(job.after.expanduser().absolute())
    return (as_built(after) if job.before is None else Database.open(job.before.expanduser().absolute())), after


def _scores(job: EvaluateJob, subject: Subject) -> dict[str, Any]:
    from retro_ray.evaluation.record import record
    from retro_ray.evaluation.tables import leakage_table, near_duplicates_table, scores_table, sweep_table

    result = record(
        subject,
        baseline=job.baseline,
        near_duplicates=job.near_duplicates,
        axes=job.sweep,
        num_workers=job.num_workers,
    )
    print(scores_table(result))
    print(leakage_table(result))
    if job.near_duplicates:
        print(near_duplicates_table(result["near_duplicates"]))
    if job.sweep:
        print(sweep_table(result["sweep"]))
    return result


def _update(job: EvaluateJob, subject: Subject, before: Database, after: Database) -> dict[str, Any]:
    from retro_ray.evaluation.results import write_result
    from retro_ray.evaluation.tables import update_table
    from retro_ray.evaluation.update import compare

    result = compare(subject, before, after, num_workers=job.num_workers)
    write_result(subject.run, "update", result)
    print(update_table(result))
    return result


def _answers(job: EvaluateJob, questions: Path) -> dict[str, Any]:
    from retro_ray.database.store import Database
    from retro_ray.evaluation.answering import answer_file
    from retro_ray.evaluation.tables import answers_table
    from retro_ray.training.run_folder import run_directory

    home = job.home.expanduser().absolute()
    run_folder = run_directory(home, job.run)
    result = answer_file(run_folder, Database.open(home), questions, job.passages, job.num_neighbours)
    print(answers_table(result))
    return result


def explain(error: BaseException) -> RetroRayError | None:
    """The user's error behind one that crossed Ray's processes."""
    from retro_ray.ray_session import user_error

    return user_error(error, default_home())


if __name__ == "__main__":
    parsed = parse(EvaluateJob, "jobs/evaluate.py")
    run(lambda: main(parsed), explain)
