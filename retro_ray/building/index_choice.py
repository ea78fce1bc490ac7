"""Which index a database gets: measured on its own keys, by queries that are held out.

In two steps, around the filling of the segments' indexes: the family is chosen on a sample of the
keys, the search parameters on all of them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retro_ray.database.format import Partition, write_json_atomically
from retro_ray.index.build import MAX_EXACT_CHUNKS, num_training_keys, read_index, train_index, write_index
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.keys import read_keys, sample_keys
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import IndexSpec, OperatingPoint
from retro_ray.index.tune import (
    MAX_TRIAL_KEYS,
    NUM_QUERIES,
    FilledIndex,
    Trial,
    best_point,
    choose_family,
    exact_trial,
    in_turns,
    spec_of,
    sweep,
)

logger = logging.getLogger(__name__)

_KEYS_PER_QUERY = 8
"""Where no documents are held out, so many keys remain for each one that serves as a query."""
_MIN_HELD_OUT = 250
"""Fewer held-out chunks measure too little."""


@dataclass(frozen=True)
class IndexAims:
    """What an index is chosen by."""

    target_recall: float
    bytes_per_chunk: int | None
    """Most memory per chunk; None: that of any codes."""
    seed: int


@dataclass(frozen=True)
class IndexChoice:
    """An index, and what was measured to choose it."""

    spec: IndexSpec
    curve: tuple[OperatingPoint, ...] = ()

    def write(self, path: Path) -> None:
        """A file that appears whole: a build that is killed and started again chooses the same."""
        write_json_atomically(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> IndexChoice:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        curve = tuple(OperatingPoint(**point) for point in content["curve"])
        return cls(IndexSpec(**content["spec"]), curve)


def is_searched_exactly(num_chunks: int, key_dim: int, target_recall: float) -> bool:
    """Whether a database needs no compressed index: it is small, or every neighbour is to be found."""
    return num_chunks <= MAX_EXACT_CHUNKS or key_dim % 4 != 0 or target_recall >= 1


def train_codec(
    directory: Path, segments: Sequence[Partition], validation: Partition | None, aims: IndexAims, codec: Path
) -> IndexChoice:
    """Choose the family of a database's index, and write its codec, if it has one, trained on keys of all segments.

    Raises:
        ConfigError: nothing fits into the memory asked for.
    """
    _use_all_cpus()
    paths = [directory / segment.keys for segment in segments]
    num_chunks = sum(segment.num_chunks for segment in segments)
    held_out = _held_out_keys(directory, validation, aims.seed)
    sample = sample_keys(paths, MAX_TRIAL_KEYS, aims.seed)
    order = np.random.default_rng(aims.seed).permutation(len(sample))
    if held_out is None:
        num_queries = min(NUM_QUERIES, len(sample) // _KEYS_PER_QUERY)
        held_out, order = sample[order[:num_queries]], order[num_queries:]
    factory, curve = choose_family(
        sample[order],
        held_out,
        num_chunks,
        target_recall=aims.target_recall,
        bytes_per_chunk=aims.bytes_per_chunk,
        num_parts=math.ceil(len(segments) * len(order) / num_chunks),
        report=lambda line: logger.info("  %s", line),
    )
    spec = IndexSpec(factory=factory)
    if spec.has_codec:
        keys = sample_keys(paths, num_training_keys(spec, num_chunks), aims.seed)
        write_index(train_index(spec, sample.shape[1], keys), codec)
    return IndexChoice(spec, tuple(curve))


def choose_search(
    directory: Path,
    segments: Sequence[Partition],
    validation: Partition | None,
    aims: IndexAims,
    codec: Path,
    family: IndexChoice,
) -> IndexChoice:
    """Choose the search parameters of filled segments; the fastest that reach the target, or the best there are."""
    _use_all_cpus()
    mapped = [(segment.chunk_id_base, read_keys(directory / segment.keys)) for segment in segments]
    num_chunks = sum(segment.num_chunks for segment in segments)
    trial = _trial(directory, segments, validation, aims.seed, mapped)
    spec, parts, size = family.spec, [], 0
    for segment in segments:
        path: Path | None = directory / segment.index(spec)
        if path.exists():
            size += path.stat().st_size
        else:
            path = None
        shard = IndexShard.open(spec, directory / segment.keys, path, mmap=True)
        parts.append((segment.chunk_id_base, segment.num_chunks / num_chunks, shard))
    encoder = QueryEncoder(spec, read_index(codec) if spec.has_codec else None)
    index = FilledIndex(spec.factory, size / num_chunks, num_chunks, encoder, parts)
    points = sweep(index, trial, aims.target_recall)
    [(_, points)] = in_turns([(index, points)], points, trial, aims.target_recall)
    best = best_point(points, aims.target_recall)
    if best is None:
        best = max(points, key=lambda point: point.recall)
        logger.warning(
            "no setting of %s reaches recall %g; the best has %.3f", best.factory, aims.target_recall, best.recall
        )
    return IndexChoice(spec_of(best), (*family.curve, *points))


def _trial(
    directory: Path,
    segments: Sequence[Partition],
    validation: Partition | None,
    seed: int,
    mapped: Sequence[tuple[int, np.ndarray]],
) -> Trial:
    held_out = _held_out_keys(directory, validation, seed)
    if held_out is not None:
        return exact_trial(held_out, mapped)
    rng = np.random.default_rng(seed)
    drawn = [
        (base, keys, np.sort(rng.choice(len(keys), min(len(keys), NUM_QUERIES // len(mapped) + 1), replace=False)))
        for base, keys in mapped
    ]
    queries = np.concatenate([keys[rows] for _, keys, rows in drawn])
    return exact_trial(queries, mapped, own_ids=np.concatenate([rows + base for base, _, rows in drawn]))


def _held_out_keys(directory: Path, validation: Partition | None, seed: int) -> np.ndarray | None:
    """Keys of the validation split, float32 [Q, D]; None where it is too small to measure by."""
    if validation is None or validation.num_chunks < _MIN_HELD_OUT:
        return None
    return sample_keys([directory / validation.keys], NUM_QUERIES, seed)


def _use_all_cpus() -> None:
    """Ray gives a task's libraries one thread."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
