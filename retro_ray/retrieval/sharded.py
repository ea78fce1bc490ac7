"""A Retriever over shard actors: fan out, merge, and never lose a query silently."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from retro_ray.database.store import Database
from retro_ray.errors import RetrievalError
from retro_ray.retrieval.local import merge_answers, merge_ids
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.retrieval.shard_actor import shard_actor

_INLINE_BYTES = 100_000
"""Larger query arrays are put into the object store once, not sent to every shard."""


class ShardedRetriever:
    """Searches a database through the actors of its shards, starting those that do not run.

    Args:
        database: the version to search.
        timeout_s: how long a shard may take to answer, its start included.
        num_attempts: how often a shard whose actor has died is started again for one query.
    """

    def __init__(self, database: Database, *, timeout_s: float = 120.0, num_attempts: int = 3) -> None:
        self._database = database
        self._timeout_s = timeout_s
        self._num_attempts = num_attempts
        self._actors = [shard_actor(database, shard) for shard in range(len(database.manifest.segments))]

    @property
    def num_shards(self) -> int:
        return len(self._actors)

    def wait_until_ready(self) -> None:
        """Returns once every shard is loaded.

        Raises:
            RetrievalError: a shard could not be loaded.
        """
        self._ask_all("ready")

    def search(self, queries: np.ndarray, k: int) -> NeighbourSet:
        return merge_answers(self._ask_all("search", _shared(queries), k), k)

    def search_ids(
        self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return merge_ids(self._ask_all("search_ids", _shared(queries), k, excluded_ids), k)

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """One call per shard, all in flight at once; a shard whose actor died is started again."""
        calls = [self._ask(shard, method, *arguments) for shard in range(self.num_shards)]
        return [self._answer(shard, call, method, *arguments) for shard, call in enumerate(calls)]

    def _ask(self, shard: int, method: str, *arguments: Any) -> ray.ObjectRef:
        return getattr(self._actors[shard], method).remote(*arguments)

    def _answer(self, shard: int, call: ray.ObjectRef, method: str, *arguments: Any) -> Any:
        cause: RayError | None = None
        for attempt in range(self._num_attempts):
            try:
                return ray.get(call, timeout=self._timeout_s)
            except (GetTimeoutError, RayTaskError) as error:
                cause = error  # too slow, or the search itself fails: asking again would change nothing
                break
            except RayError as error:
                cause = error
                if attempt + 1 < self._num_attempts:
                    self._actors[shard] = shard_actor(self._database, shard)
                    call = self._ask(shard, method, *arguments)
        raise RetrievalError(
            f"shard {shard} of {self.num_shards} of the database in {self._database.directory} did not answer "
            f"({self._what_happened(cause)}): raise timeout_s, give its node more memory, or check the files with "
            "`python -m retro_ray verify`"
        ) from cause

    def _what_happened(self, cause: RayError | None) -> str:
        """One line."""
        if isinstance(cause, GetTimeoutError):
            return f"timeout_s={self._timeout_s:g} passed"
        if isinstance(cause, RayTaskError) or (isinstance(cause, RayActorError) and cause.actor_init_failed):
            # Ray's message is the worker's traceback; its last line is the error.
            what = "the search failed" if isinstance(cause, RayTaskError) else "it cannot be loaded"
            return f"{what}: {str(cause).strip().splitlines()[-1]}"
        return f"its actor died: {' '.join(str(cause).split())[:300]}"


def _shared(queries: np.ndarray) -> Any:
    queries = np.ascontiguousarray(queries, np.float32)
    return ray.put(queries) if queries.nbytes > _INLINE_BYTES else queries
