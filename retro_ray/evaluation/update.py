"""One checkpoint in front of two states of a database: what the model knows after an update, and who told it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np

from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import DatabaseError, MismatchError
from retro_ray.evaluation.evaluate import (
    LN_2,
    bits_interval,
    describe_subject,
    document_scores,
    gain_interval,
    score_passes,
)
from retro_ray.evaluation.own_text import first_neighbours
from retro_ray.evaluation.passes import Pass
from retro_ray.evaluation.scores import PassScores
from retro_ray.evaluation.subject import Subject
from retro_ray.retrieval.lookup import documents_of
from retro_ray.training.checkpoint import require_match

_NEIGHBOURS_NAMED = 3


def as_built(database: Database) -> Database:
    """A database that was edited, without what was added, deleted and updated since it was built.

    Raises:
        DatabaseError: it was not edited, or was compacted since.
    """
    manifest = database.manifest
    built = tuple(segment for segment in manifest.segments if segment.folder.startswith(f"{manifest.build}/"))
    if not manifest.num_edits or not built:
        why = "was compacted since it was built" if manifest.num_edits else "was not edited since it was built"
        raise DatabaseError(
            f"the database in {database.directory} {why}: there is no state before to compare with; name another "
            "home with --before"
        )
    before = dataclasses.replace(
        manifest,
        segments=built,
        generation=manifest.built_generation,
        deleted=None,
        num_deleted_documents=0,
        num_deleted_chunks=0,
        num_deleted_tokens=0,
        num_deleted_bytes=0,
    )
    return Database(database.directory, before)


def compare(subject: Subject, before: Database, after: Database, *, num_workers: int | None = None) -> dict[str, Any]:
    """Score a subject's documents with the neighbours of two databases.

    Args:
        subject: whose checkpoint and documents.
        before: the one database.
        after: the other one.
        num_workers: actors. Default: one per GPU, else one per CPU.

    Raises:
        MismatchError: a database has another tokenizer, or other keys, than the text.
    """
    passes = {"off": subject.off(), "before": reading(subject, before), "after": reading(subject, after)}
    scores = score_passes(subject, passes, num_workers)
    documents = document_scores(subject, scores)
    total = {name: one.total for name, one in scores.items()}
    return {
        **describe_subject(subject),
        "before": _describe(before),
        "after": _describe(after),
        "bits_per_byte": {name: one.value for name, one in total.items()},
        "bits_per_byte_interval": {name: bits_interval(one) for name, one in documents.items()},
        "gain": 1 - total["after"].nats / total["before"].nats,
        "gain_interval": gain_interval(documents["after"], documents["before"]),
        "by_document": _by_document(subject, before, after, passes, scores),
    }


def reading(subject: Subject, database: Database) -> Pass:
    """RETRO[ON] over the subject's documents with the neighbours of another database, searched now."""
    require_match(subject.meta, database.manifest)
    own = subject.database.manifest
    if database.manifest.embedder_fingerprint != own.embedder_fingerprint:
        raise MismatchError(
            f"the database in {database.directory} was built with the embedder {database.manifest.embedder_name} "
            f"({database.manifest.embedder_fingerprint}), the text's keys are by {own.embedder_name} "
            f"({own.embedder_fingerprint}): build both with one --embedder"
        )
    return dataclasses.replace(subject, database=database, num_stored=0).on()


def _by_document(
    subject: Subject, before: Database, after: Database, passes: dict[str, Pass], scores: dict[str, PassScores]
) -> list[dict[str, Any]]:
    """What each document gained, those that gained most first, and the neighbours that brought it."""
    store, rows = subject.store, subject.rows
    saved = (scores["before"].chunks.nats - scores["after"].chunks.nats) / LN_2
    brought = _credits(
        store, rows, saved, _neighbours(passes["before"], before, rows), _neighbours(passes["after"], after, rows)
    )
    sums = document_scores(subject, scores)
    described = []
    for place, document in enumerate(sums["after"].documents):
        bits = {name: float(one.nats[place]) / LN_2 for name, one in sums.items()}
        num_bytes = int(sums["after"].num_bytes[place])
        credit = sorted(brought[int(document)].items(), key=lambda item: -item[1])[:_NEIGHBOURS_NAMED]
        ref = store.document_ref(int(document))
        described.append(
            {
                "document": ref.id,
                "title": ref.title,
                "text_bytes": num_bytes,
                "bits_per_byte": {name: value / max(1, num_bytes) for name, value in bits.items()},
                "saved_bits": bits["before"] - bits["after"],
                "neighbours": [{"document": name, "saved_bits": value} for name, value in credit if value > 0],
            }
        )
    return sorted(described, key=lambda one: -one["saved_bits"])


def _neighbours(one: Pass, database: Database, rows: np.ndarray) -> list[list[tuple[str, bytes]]]:
    """Of each chunk, its neighbours as document and tokens, which mean the same in both databases."""
    if one.neighbours is None:
        return [[] for _ in rows]
    ids = first_neighbours(one.neighbours, one.num_neighbours)(rows)
    tokens, _ = database.neighbour_tokens(ids)
    refs = documents_of(database, ids)
    return [
        [(ref.id, own.tobytes()) for ref, own in zip(row_refs, row_tokens, strict=True) if ref is not None]
        for row_refs, row_tokens in zip(refs, tokens, strict=True)
    ]


def _credits(
    store: ChunkStore,
    rows: np.ndarray,
    saved: np.ndarray,
    before: list[list[tuple[str, bytes]]],
    after: list[list[tuple[str, bytes]]],
) -> dict[int, dict[str, float]]:
    """Bits saved in each document by document of the database: those of a chunk go to the new neighbours of the chunk
    before it, in equal parts.
    """
    owner = store.document_of(rows)
    credit: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for place in range(len(rows) - 1):
        if owner[place] != owner[place + 1]:
            continue
        new = [name for name, tokens in after[place] if (name, tokens) not in before[place]]
        for name in new:
            credit[int(owner[place])][name] += float(saved[place + 1]) / len(new)
    return credit


def _describe(database: Database) -> dict[str, Any]:
    manifest = database.manifest
    return {
        "directory": str(database.directory),
        "version": manifest.version,
        "generation": manifest.generation,
        "documents": manifest.num_live_documents,
        "chunks": manifest.num_live_chunks,
    }
