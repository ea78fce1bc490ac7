"""Scoring a checkpoint with retrieval on, off and random, beside a baseline, and what is left of the gain where nothing
can be copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_ray.evaluation.intervals import Interval, interval_of_ratio
from retro_ray.evaluation.overlap import (
    NUM_NEIGHBOURS,
    FilteredScore,
    overlaps_with_neighbours,
    score_by_overlap,
)
from retro_ray.evaluation.own_text import first_neighbours
from retro_ray.evaluation.scores import BitsPerByte, DocumentScores, PassScores
from retro_ray.evaluation.subject import Subject
from retro_ray.evaluation.workers import forget_other_models, run_passes

LN_2 = float(np.log(2))


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint on some documents, by what it retrieves: on, off, random; and those of a baseline."""

    subject: Subject
    passes: dict[str, PassScores]
    baseline: Path | None
    """Its checkpoint."""
    overlaps: np.ndarray
    """float64 [n], r(C) of every chunk, in the order of the passes' chunks."""
    leakage: list[FilteredScore]

    @property
    def scores(self) -> dict[str, BitsPerByte]:
        """Sums over all documents."""
        return {name: one.total for name, one in self.passes.items()}

    @property
    def by_document(self) -> dict[str, DocumentScores]:
        """Sums of each document."""
        return document_scores(self.subject, self.passes)

    def to_dict(self) -> dict[str, Any]:
        """What --json writes."""
        subject, scores = self.subject, self.scores
        bits = {name: score.value for name, score in scores.items()}
        documents = self.by_document
        return {
            **describe_subject(subject),
            "baseline": None if self.baseline is None else str(self.baseline),
            "tokens": scores["on"].num_tokens,
            "words": subject.num_words,
            "text_bytes": scores["on"].num_bytes,
            "bits_per_byte": bits,
            "bits_per_byte_interval": {name: bits_interval(one) for name, one in documents.items()},
            "token_perplexity": {name: score.token_perplexity for name, score in scores.items()},
            "word_perplexity": {name: score.word_perplexity(subject.num_words) for name, score in scores.items()},
            "last_token_accuracy": {name: score.last_token_accuracy for name, score in scores.items()},
            "gain_on_over_off": 1 - bits["on"] / bits["off"],
            "gain_on_over_off_interval": gain_interval(documents["on"], documents["off"]),
            "gain_random_over_off": 1 - bits["random"] / bits["off"],
            "gain_on_over_baseline": 1 - bits["on"] / bits["baseline"] if "baseline" in bits else None,
            "nats_by_place": {name: one.nats_by_place.tolist() for name, one in self.passes.items()},
            "leakage": [
                {
                    "alpha": point.alpha,
                    "chunks": point.num_chunks,
                    "text_bytes": point.scores["on"].num_bytes,
                    "bits_per_byte": {name: score.value for name, score in point.scores.items()},
                }
                for point in self.leakage
            ],
        }


def evaluate(subject: Subject, *, baseline: Path | None = None, num_workers: int | None = None) -> Evaluation:
    """Score a subject with retrieval on, off, and with random neighbours.

    Args:
        subject: from `open_subject`.
        baseline: folder of a checkpoint, a run or a home, whose model is scored without retrieval.
        num_workers: actors. Default: one per GPU, else one per CPU.

    Raises:
        CheckpointError: there is no such baseline.
        MismatchError: the baseline has another tokenizer.
    """
    wanted = {"on": subject.on(), "off": subject.off(), "random": subject.random()}
    if baseline is not None:
        wanted["baseline"] = subject.baseline(baseline)
    passes = score_passes(subject, wanted, num_workers)
    overlaps = chunk_overlaps(subject)
    compared = {name: one.chunks for name, one in passes.items() if name != "random"}
    return Evaluation(
        subject=subject,
        passes=passes,
        baseline=wanted["baseline"].checkpoint if baseline is not None else None,
        overlaps=overlaps,
        leakage=score_by_overlap(overlaps, compared),
    )


def score_passes(subject: Subject, passes: Mapping[str, Any], num_workers: int | None = None) -> dict[str, PassScores]:
    """Passes over the subject's documents, those that were made before taken from the disk."""
    cache = forget_other_models(subject.score_cache, subject.weights)
    return run_passes(passes, subject.text, subject.documents, cache, num_workers)


def chunk_overlaps(subject: Subject) -> np.ndarray:
    """r(C) of every scored chunk with its 10 nearest neighbours in the database, float64 [n].

    The nearest ones, also where the model is given them reranked.
    """
    manifest = subject.database.manifest
    nearest = None if manifest.rerank == "none" else dataclasses.replace(manifest, rerank="none")
    file = subject.neighbours(NUM_NEIGHBOURS, nearest)
    return overlaps_with_neighbours(
        subject.store, subject.database, subject.rows, first_neighbours(file, NUM_NEIGHBOURS)
    )


def document_scores(subject: Subject, passes: Mapping[str, PassScores]) -> dict[str, DocumentScores]:
    """Sums of each document, by pass."""
    owner = subject.store.document_of(subject.rows)
    return {name: one.chunks.by_document(owner) for name, one in passes.items()}


def bits_interval(scores: DocumentScores) -> Interval:
    """Of bits per byte."""
    return interval_of_ratio(scores.nats / LN_2, scores.num_bytes)


def gain_interval(better: DocumentScores, worse: DocumentScores) -> Interval:
    """Of the share of bits that `better` saves, over the same documents."""
    ratio = interval_of_ratio(better.nats, worse.nats)
    return Interval(1 - ratio.high, 1 - ratio.low)


def describe_subject(subject: Subject) -> dict[str, Any]:
    """What was scored, with what: the part that every result of an evaluation begins with."""
    manifest = subject.database.manifest
    return {
        "input": None if subject.input is None else list(subject.input),
        "checkpoint": str(subject.checkpoint),
        "checkpoint_weights": subject.weights[:16],
        "step": subject.meta.step,
        "database": str(subject.database.directory),
        "database_version": manifest.version,
        "database_generation": manifest.generation,
        "database_documents": manifest.num_live_documents,
        "database_chunks": manifest.num_live_chunks,
        "tokenizer": manifest.tokenizer_fingerprint,
        "embedder": f"{manifest.embedder_name} ({manifest.embedder_fingerprint})",
        "index": manifest.index.factory,
        "num_neighbours": subject.num_neighbours,
        "documents": len(subject.documents),
        "chunks": len(subject.rows),
        "text_fingerprint": subject.text.identity[:16],
    }
