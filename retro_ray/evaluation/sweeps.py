"""Bits per byte over what retrieval depends on: the number of neighbours, the size of the database, how well it is
searched, what of the neighbours is shown.

Every point is a pass of the same checkpoint over the same documents, with neighbours searched in a variant of the
database's manifest: a smaller database is the whole one with documents marked as deleted, a worse search one that
visits fewer lists, or looks at fewer rows of a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from retro_ray.database.deleted import DeletedDocuments
from retro_ray.database.format import DELETED_SCHEMA, Manifest
from retro_ray.evaluation.evaluate import (
    bits_interval,
    describe_subject,
    document_scores,
    gain_interval,
    score_passes,
)
from retro_ray.evaluation.passes import Pass
from retro_ray.evaluation.subject import Subject
from retro_ray.index.spec import IndexSpec

SweepAxis = Literal["k", "share", "nprobe", "parts", "rerank"]

_NEIGHBOURS = (1, 2, 4, 8, 16)
_SHARES = (0.1, 0.25, 0.5, 1.0)
_NPROBES = (1, 2, 4, 8, 16, 32, 64, 128)
_LEAST_OF_GRAPH = 16
"""As many rows as are listed are looked at in any case."""


class SweepPoint(NamedTuple):
    """One setting of one axis."""

    axis: SweepAxis
    value: str
    make: Callable[[], Pass]
    """Searches its neighbours."""
    note: str = ""


def sweep(
    subject: Subject, axes: Sequence[SweepAxis], *, num_workers: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Score a subject along some axes.

    Args:
        subject: from `open_subject`.
        axes: which; an axis that the database has not is explained in the result's notes.
        num_workers: actors. Default: one per GPU, else one per CPU.
        seed: of the random shares of the database.
    """
    points: list[SweepPoint] = []
    notes = []
    for axis in dict.fromkeys(axes):
        found = list(_AXES[axis](subject, seed))
        points += [one for one in found if isinstance(one, SweepPoint)]
        notes += [one for one in found if isinstance(one, str)]
    passes = {"off": subject.off()} | {f"{point.axis} {point.value}": point.make() for point in points}
    scores = score_passes(subject, passes, num_workers)
    documents = document_scores(subject, scores)
    described = []
    for point in points:
        name = f"{point.axis} {point.value}"
        described.append(
            {
                "axis": point.axis,
                "value": point.value,
                "note": point.note,
                "bits_per_byte": scores[name].total.value,
                "interval": bits_interval(documents[name]),
                "gain_over_off": 1 - scores[name].total.nats / scores["off"].total.nats,
                "gain_interval": gain_interval(documents[name], documents["off"]),
            }
        )
    return {
        **describe_subject(subject),
        "bits_per_byte_off": scores["off"].total.value,
        "interval_off": bits_interval(documents["off"]),
        "points": described,
        "notes": notes,
    }


def _numbers_of_neighbours(subject: Subject, seed: int) -> Iterator[SweepPoint]:
    wanted = {count for count in _NEIGHBOURS if count <= subject.num_stored} | {subject.num_neighbours}
    for count in sorted(wanted):
        note = "as in training" if count == subject.meta.config.model.num_neighbours else ""
        yield SweepPoint("k", str(count), lambda count=count: subject.on(count), note)


def _database_sizes(subject: Subject, seed: int) -> Iterator[SweepPoint]:
    for share in _SHARES:
        if share == 1:
            num_chunks = subject.database.manifest.num_live_chunks
            yield SweepPoint("share", "100%", subject.on, f"{num_chunks:,} chunks")
            continue
        manifest = with_share_of_documents(subject, share, seed)
        yield SweepPoint(
            "share",
            f"{share:.0%}",
            lambda manifest=manifest: subject.on(manifest=manifest),
            f"{manifest.num_live_chunks:,} chunks",
        )


def _lists_visited(subject: Subject, seed: int) -> Iterator[SweepPoint | str]:
    manifest = subject.database.manifest
    spec = manifest.index
    if spec.is_exact:
        yield "nprobe: the index of this database is exact, so there is no quality of search to vary"
        return
    least = _LEAST_OF_GRAPH if spec.is_graph else 1
    for nprobe in sorted({nprobe for nprobe in _NPROBES if least <= nprobe < spec.nprobe} | {spec.nprobe}):
        variant = dataclasses.replace(manifest, index=dataclasses.replace(spec, nprobe=nprobe))
        note = "as the database is searched" if nprobe == spec.nprobe else ""
        yield SweepPoint("nprobe", str(nprobe), lambda variant=variant: subject.on(manifest=variant), note)
    exact = dataclasses.replace(manifest, index=IndexSpec(factory="Flat"), codec=None)
    yield SweepPoint("nprobe", "exact", lambda: subject.on(manifest=exact), "all keys compared")


def _parts_of_neighbours(subject: Subject, seed: int) -> Iterator[SweepPoint]:
    yield SweepPoint("parts", "[N, F]", subject.on, "chunk and continuation")
    yield SweepPoint("parts", "N", lambda: subject.on(parts="N"), "the chunk that was found alone")
    yield SweepPoint("parts", "F", lambda: subject.on(parts="F"), "its continuation alone")


def _reranking(subject: Subject, seed: int) -> Iterator[SweepPoint | str]:
    manifest = subject.database.manifest
    if manifest.token_statistics is None:
        yield "rerank: this database has no token statistics, without which nothing can be reranked"
        return
    for method in ("none", "overlap"):
        variant = dataclasses.replace(manifest, rerank=method)
        note = "as the database is searched" if method == manifest.rerank else ""
        yield SweepPoint("rerank", method, lambda variant=variant: subject.on(manifest=variant), note)


_AXES: dict[SweepAxis, Callable[[Subject, int], Iterator[SweepPoint | str]]] = {
    "k": _numbers_of_neighbours,
    "share": _database_sizes,
    "nprobe": _lists_visited,
    "parts": _parts_of_neighbours,
    "rerank": _reranking,
}


def with_share_of_documents(subject: Subject, share: float, seed: int = 0) -> Manifest:
    """The database with only a random share of its documents, the others marked as deleted.

    A larger share holds the documents of a smaller one.
    """
    database = subject.database
    rows, sizes = [], [np.empty(0, np.int64)]
    rng = np.random.default_rng(seed)
    for store in database.segments:
        first = store.chunk_id_base + store.document_first_row
        left_out = (rng.random(len(first)) >= share) | database.is_deleted(first)
        refs = store.document_refs(np.flatnonzero(left_out))
        last = first + store.document_num_chunks - 1
        bounds = zip(refs, first[left_out].tolist(), last[left_out].tolist(), strict=True)
        rows += [{"id": ref.id, "first_chunk_id": start, "last_chunk_id": stop} for ref, start, stop in bounds]
        sizes.append(store.document_num_chunks[left_out])
    path = subject.scratch / f"without-{share}-{seed}.arrow"
    table = pa.Table.from_pylist(rows, schema=DELETED_SCHEMA).sort_by("first_chunk_id")
    DeletedDocuments(table).write(path)
    return dataclasses.replace(
        database.manifest,
        deleted=str(path),
        num_deleted_documents=len(rows),
        num_deleted_chunks=int(np.concatenate(sizes).sum()),
    )
