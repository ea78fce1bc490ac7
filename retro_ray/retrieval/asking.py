"""The side that asks: one consistent answer over all shards, with the text and the documents of what was found.

Shards answer with candidates alone. Tokens and documents of the winners are read here, from the same
memory-mapped segments (a home is a folder that all nodes share), so only small arrays cross.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from retro_ray.database.store import Database
from retro_ray.errors import MismatchError, RetrievalError
from retro_ray.index.build import read_index
from retro_ray.index.encoder import PreparedQueries, QueryEncoder
from retro_ray.index.exact import threads_at_most
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted, search_parts
from retro_ray.retrieval.answering import nothing_found
from retro_ray.retrieval.following import Commit, CommitId, FollowedManifest
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest

_PAUSE_S = 0.01


class Shards(Protocol):
    """Reaches the side that answers."""

    @property
    def requests_at_a_time(self) -> int:
        """How many requests of one large batch to work on side by side, each in a thread of its own."""
        ...

    @property
    def are_elsewhere(self) -> bool:
        """Whether the processors of this process are not theirs."""
        ...

    def num_requests(self, num_queries: int) -> int:
        """Into how many requests to cut a batch."""
        ...

    def ask(self, request: CandidateRequest, num_shards: int) -> tuple[Sequence[CandidateAnswer], tuple[int, ...]]:
        """The answers of the shards, and the shards that gave none.

        Raises:
            RetrievalError: a shard did not answer, and that is not to be passed over.
        """
        ...


@dataclass(frozen=True)
class Found:
    """The neighbours of Q queries in one state of the database."""

    database: Database
    distances: np.ndarray
    """float32 [Q, k]."""
    chunk_ids: np.ndarray
    """int64 [Q, k]."""
    missing_shards: tuple[int, ...]


@dataclass(frozen=True)
class _View:
    """One state of the database, as the side that asks needs it."""

    commit: CommitId
    database: Database
    encoder: QueryEncoder
    codec: tuple[str, ...] | None
    """Tells whether the encoder is still the right one."""


@dataclass
class _Asking:
    """Asks all shards about one state, and remembers what was missing."""

    view: _View
    shards: Shards
    missing: set[int] = field(default_factory=set)

    def __call__(
        self, queries: PreparedQueries, wanted: Wanted, excluded_ids: np.ndarray | None
    ) -> Sequence[Candidates]:
        request = CandidateRequest(self.view.commit, queries, wanted, excluded_ids)
        answers, missing = self.shards.ask(request, self.view.database.manifest.num_shards)
        self.missing.update(missing)
        candidates = []
        for answer in answers:
            if answer.candidates is None or answer.commit != self.view.commit:
                raise _OtherCommitError(answer.commit)
            candidates.append(answer.candidates)
        return candidates or [nothing_found(len(queries))]


class _OtherCommitError(Exception):
    """A shard holds another state of the database than was asked about."""

    def __init__(self, commit: CommitId) -> None:
        super().__init__(commit)
        self.commit = commit


class Asker:
    """Searches a database through its shards. Any number of threads may use it.

    An answer is always of one commit: where a shard has moved on, or has not yet, all are asked anew.

    Args:
        follow: the database's manifest.
        shards: reaches them.
        timeout_s: how long all sides may take to come to the same commit.

    Raises:
        DatabaseError: there is no database.
    """

    def __init__(self, follow: FollowedManifest, shards: Shards, timeout_s: float) -> None:
        self._follow = follow
        self._shards = shards
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._view = _open_view(follow, follow.current(), None)
        self._pool = ThreadPoolExecutor(shards.requests_at_a_time, thread_name_prefix="retro-ray-asking")

    @property
    def database(self) -> Database:
        """As it is now.

        Raises:
            MismatchError: it has been rebuilt with another tokenizer, chunk length or embedder.
        """
        return self._current_view().database

    def search(self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None) -> Found:
        """The `k` nearest chunks of each query, float32 [Q, D]; `excluded_ids` as in Retriever.search_ids.

        Raises:
            RetrievalError: a shard did not answer, or the queries are not of the database's dimension.
        """
        if queries.ndim != 2 or queries.shape[1] != self.database.manifest.key_dim:
            raise RetrievalError(
                f"queries of shape {queries.shape} for a database whose keys have {self.database.manifest.key_dim} "
                "dimensions: embed them with the embedder that it was built with"
            )
        deadline = time.monotonic() + self._timeout_s
        while True:
            view = self._current_view()
            try:
                return self._search(view, np.ascontiguousarray(queries, np.float32), k, excluded_ids)
            except _OtherCommitError as error:
                if time.monotonic() > deadline:
                    raise RetrievalError(
                        f"the shards of the database in {self._follow.directory} hold generation "
                        f"{error.commit.generation}, its manifest here says {view.commit.generation}, for "
                        f"timeout_s={self._timeout_s:g}: do all nodes see the same folder?"
                    ) from error
                if self._follow.current(error.commit.generation).id == view.commit:
                    time.sleep(_PAUSE_S)  # the shard is behind, and looks again when it is asked again

    def _search(self, view: _View, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None) -> Found:
        asking = _Asking(view, self._shards)
        spec = view.database.manifest.index

        num_requests = self._shards.num_requests(len(queries))
        at_a_time = min(self._shards.requests_at_a_time, num_requests)

        def search_piece(piece: slice) -> tuple[np.ndarray, np.ndarray]:
            excluded = None if excluded_ids is None else excluded_ids[piece]
            # Threads of OpenMP wait for each other, awake: they would be in the way of shards elsewhere, and of each
            # other where every thread has queries of its own.
            with threads_at_most(1) if at_a_time > 1 or self._shards.are_elsewhere else contextlib.nullcontext():
                return search_parts(queries[piece], k, spec, view.encoder, asking, excluded)

        over = self._pool.map if at_a_time > 1 else map
        found = list(over(search_piece, _pieces(len(queries), num_requests)))
        distances, chunk_ids = (np.concatenate(column) for column in zip(*found, strict=True))
        return Found(view.database, distances, chunk_ids, tuple(sorted(asking.missing)))

    def _current_view(self) -> _View:
        commit = self._follow.current()
        if commit.id == self._view.commit:
            return self._view
        with self._lock:
            commit = self._follow.current()
            if commit.id != self._view.commit:
                self._view = _open_view(self._follow, commit, self._view)
            return self._view


def _pieces(num_queries: int, num_pieces: int) -> Iterator[slice]:
    bounds = np.linspace(0, num_queries, num_pieces + 1).astype(int).tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise(bounds))


def _open_view(follow: FollowedManifest, commit: Commit, before: _View | None) -> _View:
    """What a commit is asked with; the encoder is kept where the codec is the same."""
    manifest = commit.manifest
    if before is not None:
        old = before.database.manifest
        for name, setting in (
            ("tokenizer_fingerprint", "tokenizer"),
            ("chunk_length", "chunk_length"),
            ("embedder_fingerprint", "embedder"),
        ):
            if getattr(old, name) != getattr(manifest, name):
                raise MismatchError(
                    f"the database in {follow.directory} has been rebuilt with another {setting} "
                    f"({getattr(old, name)} before, {getattr(manifest, name)} now): start this program again"
                )
    codec = None if manifest.codec is None else (manifest.files[manifest.codec].sha256, repr(manifest.index))
    if before is not None and codec is not None and before.codec == codec:
        encoder = before.encoder
    else:
        trained = None if manifest.codec is None else read_index(follow.directory / manifest.codec)
        encoder = QueryEncoder(manifest.index, trained)
    return _View(commit.id, Database(follow.directory, manifest), encoder, codec)
