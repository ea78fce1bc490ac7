"""A whole evaluation of a subject, each result kept beside the run as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retro_ray.evaluation.evaluate import evaluate
from retro_ray.evaluation.examples import find_examples
from retro_ray.evaluation.near_duplicates import find_near_duplicates
from retro_ray.evaluation.results import write_result
from retro_ray.evaluation.subject import Subject
from retro_ray.evaluation.sweeps import SweepAxis, sweep


def record(
    subject: Subject,
    *,
    baseline: Path | None = None,
    near_duplicates: bool = False,
    axes: Sequence[SweepAxis] = (),
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Evaluate; see `evaluate`, `find_near_duplicates` and `sweep`. Returns what --json writes."""
    evaluation = evaluate(subject, baseline=baseline, num_workers=num_workers)
    result = evaluation.to_dict()
    write_result(subject.run, "scores", result)
    write_result(subject.run, "examples", find_examples(evaluation))
    if near_duplicates:
        result["near_duplicates"] = find_near_duplicates(subject)
        write_result(subject.run, "near_duplicates", result["near_duplicates"])
    if axes:
        result["sweep"] = sweep(subject, axes, num_workers=num_workers)
        write_result(subject.run, "sweep", result["sweep"])
    return result
