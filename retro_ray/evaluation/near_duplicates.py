"""Evaluated documents of which the database has nearly the same one: a score on these says what was copied."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import ray

from retro_ray.database.format import Manifest
from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.evaluate import describe_subject
from retro_ray.evaluation.own_text import document_tokens
from retro_ray.evaluation.subject import Subject
from retro_ray.ray_session import run_tasks
from retro_ray.text.near_duplicates import MIN_JACCARD, NearDocuments, shingles

_CHUNKS_PER_TASK = 20_000


def find_near_duplicates(subject: Subject) -> dict[str, Any]:
    """All pairs of an evaluated document and one of the database whose 13-grams overlap by 80 % or more."""
    store, database = subject.store, subject.database
    evaluated = NearDocuments((str(d), document_shingles(store, int(d))) for d in subject.documents)
    near, common = ray.put(evaluated), (database.directory, database.manifest)
    tasks = [(near, *common, segment, part) for segment, part in _parts(database)]
    found = [pair for pairs in run_tasks(ray.remote(near_in_segment), tasks, "near duplicates") for pair in pairs]
    found.sort(key=lambda pair: (-pair[3], pair[0], pair[1], pair[2]))
    pairs = []
    for document, segment, row, similarity in found:
        own, other = store.document_ref(document), database.segments[segment].document_ref(row)
        pairs.append(
            {
                "document": own.id,
                "title": own.title,
                "near": other.id,
                "near_title": other.title,
                "near_source": other.source,
                "jaccard": similarity,
            }
        )
    return {
        **describe_subject(subject),
        "min_jaccard": MIN_JACCARD,
        "documents_with": len({pair["document"] for pair in pairs}),
        "pairs": pairs,
    }


def near_in_segment(
    evaluated: NearDocuments, directory: Path, manifest: Manifest, segment: int, documents: tuple[int, int]
) -> list[tuple[int, int, int, float]]:
    """Pairs with documents of a segment: evaluated document, segment, its document, similarity.

    Args:
        evaluated: by their number.
        directory: of the database.
        manifest: of the database.
        segment: which one.
        documents: the first of them, and the one after the last.
    """
    database = Database(directory, manifest)
    store, found = database.segments[segment], []
    for row in range(*documents):
        if not database.is_deleted(store.chunk_id_base + store.document_first_row[row]):
            near = evaluated.near(document_shingles(store, row))
            found += [(int(one.name), segment, row, one.jaccard) for one in near]
    return found


def document_shingles(store: ChunkStore, document: int) -> np.ndarray:
    """The 13-grams of a stored document."""
    return shingles(document_tokens(store, document)[1:])


def _parts(database: Database) -> list[tuple[int, tuple[int, int]]]:
    """Segments in ranges of documents of about so many chunks."""
    parts = []
    for segment, store in enumerate(database.segments):
        number = np.cumsum(store.document_num_chunks) // _CHUNKS_PER_TASK
        bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), store.num_documents]
        parts += [(segment, (first, stop)) for first, stop in itertools.pairwise(bounds) if stop > first]
    return parts
