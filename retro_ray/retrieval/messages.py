"""What crosses between the side that asks and the side that answers: a few arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retro_ray.index.encoder import PreparedQueries
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted
from retro_ray.retrieval.following import CommitId


@dataclass(frozen=True)
class CandidateRequest:
    """Queries for one shard."""

    commit: CommitId
    """The state of the database that is asked about: the queries were prepared with its codec."""
    queries: PreparedQueries
    wanted: Wanted
    excluded_ids: np.ndarray | None
    """int64 [Q, 2]: first and last chunk_id to pass over, (-1, -1) for none; None: none for all."""

    @property
    def num_bytes(self) -> int:
        """About what it takes on the wire."""
        arrays = (*vars(self.queries).values(), self.excluded_ids)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True)
class CandidateAnswer:
    """What a shard has for a request."""

    commit: CommitId
    """The state of the database that the shard holds."""
    candidates: Candidates | None
    """With chunk_ids; None where the shard holds another state than was asked about."""
    num_queued: int = 0
    """Requests that wait at the shard."""
