"""The side that answers: the segments of one shard, kept as the manifest says, and their candidates."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_ray.database.format import Manifest, Partition
from retro_ray.database.store import Database
from retro_ray.index.encoder import PreparedQueries
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted
from retro_ray.index.shard import IndexShard
from retro_ray.retrieval.following import Commit, CommitId, FollowedManifest
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest


@dataclass(frozen=True)
class _Segment:
    """One segment as it is searched."""

    identity: Hashable
    """Equal for what need not be loaded again."""
    chunk_id_base: int
    index: IndexShard
    share: float
    """Of all chunks of the database."""

    def candidates(self, queries: PreparedQueries, wanted: Wanted, excluded_ids: np.ndarray | None) -> Candidates:
        excluded_rows = None
        if excluded_ids is not None:
            end = self.chunk_id_base + self.index.num_rows
            overlaps = (excluded_ids[:, :1] < end) & (excluded_ids[:, 1:] >= self.chunk_id_base)
            excluded_rows = np.where(overlaps, excluded_ids - self.chunk_id_base, -1)
        found = self.index.candidates(queries, wanted.of_part(self.share), excluded_rows)
        return found.with_base(self.chunk_id_base)


@dataclass(frozen=True)
class _View:
    """One state of the database, as one shard holds it."""

    commit: CommitId
    segments: tuple[_Segment, ...]


class ServedShard:
    """The segments of one shard, ready to be searched; a commit takes effect before the next answer.

    Args:
        directory: of the database.
        shard: which one; None: all of them.
        pinned: serve this manifest and no other, for a build that is not committed yet.
        mmap: leave index and keys on disk and read what is looked at, but for a graph, which is read into memory; the
            files' sizes are checked then, not their checksums, since that would read all of them.

    Raises:
        DatabaseError: a file is missing or damaged; names it.
    """

    def __init__(
        self, directory: Path, shard: int | None = None, *, pinned: Manifest | None = None, mmap: bool = False
    ) -> None:
        self._follow = FollowedManifest(directory, pinned)
        self._shard = shard
        self._mmap = mmap
        self._lock = threading.Lock()
        self._view = self._load(self._follow.current(), ())

    def refresh(self, at_least: int = 0) -> CommitId:
        """Load what was committed meanwhile; returns what is held now.

        Args:
            at_least: a generation that is known to be there.

        Raises:
            DatabaseError: a file of the new state is missing or damaged.
        """
        return self._current(at_least).commit

    def answer(self, requests: Sequence[CandidateRequest]) -> list[CandidateAnswer]:
        """Answer several requests as one batch; all of one group (see `group_of`)."""
        view = self._current(requests[0].commit.generation)
        if view.commit != requests[0].commit:
            return [CandidateAnswer(view.commit, None)] * len(requests)
        sizes = [len(request.queries) for request in requests]
        queries = requests[0].queries
        if len(requests) > 1:
            queries = PreparedQueries.concatenate([request.queries for request in requests])
        excluded_ids = _joined_exclusions(requests)
        found = _side_by_side(
            [segment.candidates(queries, requests[0].wanted, excluded_ids) for segment in view.segments], len(queries)
        )
        ends = np.cumsum(sizes)
        return [
            CandidateAnswer(view.commit, found if len(requests) == 1 else _rows(found, end - size, end))
            for size, end in zip(sizes, ends, strict=True)
        ]

    @staticmethod
    def group_of(request: CandidateRequest) -> Hashable:
        """Requests of equal groups can be answered as one batch."""
        wanted = request.wanted
        return request.commit, wanted.num_candidates, wanted.widening, request.queries.lists.shape[1]

    def _current(self, at_least: int) -> _View:
        commit = self._follow.current(at_least)
        if commit.id == self._view.commit:
            return self._view
        with self._lock:
            commit = self._follow.current(at_least)
            if commit.id != self._view.commit:
                self._view = self._load(commit, self._view.segments)
            return self._view

    def _load(self, commit: Commit, loaded: Iterable[_Segment]) -> _View:
        database = Database(self._follow.directory, commit.manifest)
        partitions = [part for part in commit.manifest.segments if self._shard is None or part.shard == self._shard]
        known = {segment.identity: segment.index for segment in loaded}
        return _View(commit.id, tuple(self._open(database, part, known) for part in partitions))

    def _open(self, database: Database, part: Partition, known: dict[Hashable, IndexShard]) -> _Segment:
        manifest = database.manifest
        searched = part.index(manifest.index)
        listed = [path for path in (searched, part.keys, part.chunks, part.documents) if path in manifest.files]
        identity = (part.folder, part.chunk_id_base, manifest.index, *(manifest.files[path].sha256 for path in listed))
        deleted = database.deleted.rows(part.chunk_id_base, part.num_chunks) if len(database.deleted) else None
        index = known.get(identity)
        if index is None:
            database.check_files(*listed, sizes_only=self._mmap)
            keys, path = database.directory / part.keys, database.directory / searched
            index = IndexShard.open(manifest.index, keys, path if searched in listed else None, deleted, self._mmap)
        else:
            index = copy.copy(index)  # searches that run now go on with what was deleted before
            index.set_deleted(deleted)
        return _Segment(identity, part.chunk_id_base, index, part.num_chunks / max(1, manifest.num_chunks))


def nothing_found(num_queries: int) -> Candidates:
    """The candidates of a shard without chunks."""
    nothing = np.empty((num_queries, 0), np.float32)
    return Candidates(nothing, nothing, nothing.astype(np.int64), np.full(num_queries, np.inf, np.float32))


def _side_by_side(parts: Sequence[Candidates], num_queries: int) -> Candidates:
    """The candidates of several segments as those of one."""
    if len(parts) <= 1:
        return parts[0] if parts else nothing_found(num_queries)
    return Candidates(
        np.concatenate([part.coarse for part in parts], axis=1),
        np.concatenate([part.distances for part in parts], axis=1),
        np.concatenate([part.ids for part in parts], axis=1),
        np.min([part.hidden_from for part in parts], axis=0),
    )


def _rows(found: Candidates, start: int, stop: int) -> Candidates:
    return Candidates(
        found.coarse[start:stop], found.distances[start:stop], found.ids[start:stop], found.hidden_from[start:stop]
    )


def _joined_exclusions(requests: Sequence[CandidateRequest]) -> np.ndarray | None:
    if all(request.excluded_ids is None for request in requests):
        return None
    return np.concatenate(
        [
            np.full((len(request.queries), 2), -1, np.int64) if request.excluded_ids is None else request.excluded_ids
            for request in requests
        ]
    )
