#!/usr/bin/env python3
"""Score a trained model on held-out documents, or on documents of one's own: bits per byte and perplexities with
retrieval on, off, and random.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.command_line import parse, run
from retro_ray.config import CorpusConfig, RecordConfig, default_home
from retro_ray.errors import RetroRayError


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Score the newest checkpoint of a run on the validation split of the database, or on --input."""

    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    run: str = "default"
    """Run whose newest checkpoint is scored."""
    input: tuple[str, ...] = ()
    """Files, folders and globs of documents to score in place of the validation split; see jobs/index.py --input. They
    are embedded on this machine and put into no database."""
    records: RecordConfig = field(default_factory=RecordConfig)
    num_neighbours: int | None = None
    """Neighbours per chunk. Default: as many as in training."""
    max_chunks: int | None = None
    """Score about so many chunks, of documents chosen at random. Default: the whole split."""
    num_workers: int | None = None
    """Processes. Default: one per GPU, else one per CPU."""
    json: Path | None = None
    """Write the result to this file as one JSON object."""


def main(job: EvaluateJob) -> None:
    """Evaluate, then print a table."""
    from retro_ray.evaluation.evaluate import evaluate
    from retro_ray.ray_session import connect

    connect()
    evaluation = evaluate(
        job.home.expanduser().absolute(),
        job.run,
        corpus=CorpusConfig(input=job.input, **dataclasses.asdict(job.records)) if job.input else None,
        num_neighbours=job.num_neighbours,
        max_chunks=job.max_chunks,
        num_workers=job.num_workers,
    )
    result = evaluation.to_dict()
    if job.json is not None:
        job.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"step {result['step']}, {result['documents']} documents, {result['text_bytes']} bytes of text")
    print(f"{'retrieval':>10}  bits per byte  token perplexity  word perplexity  last token right")
    for mode, bits in result["bits_per_byte"].items():
        token, word, last = (
            result[name][mode] for name in ("token_perplexity", "word_perplexity", "last_token_accuracy")
        )
        print(f"{mode:>10}  {bits:13.4f}  {token:16.2f}  {word:15.2f}  {last:16.1%}")
    print(f"retrieval lowers bits per byte by {result['gain_on_over_off']:.1%},", end=" ")
    print(f"random neighbours by {result['gain_random_over_off']:.1%}")


def explain(error: BaseException) -> RetroRayError | None:
    """The user's error behind one that crossed Ray's processes."""
    from retro_ray.ray_session import user_error

    return user_error(error, default_home())


if __name__ == "__main__":
    parsed = parse(EvaluateJob, "jobs/evaluate.py")
    run(lambda: main(parsed), explain)
