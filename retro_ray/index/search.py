"""The whole search: ask the parts of a database, merge, and ask again what is not certain yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from retro_ray.index.encoder import PreparedQueries, QueryEncoder
from retro_ray.index.merge import Candidates, merge_candidates
from retro_ray.index.spec import IndexSpec

_MORE_LISTS = 4
_MORE_CANDIDATES = 2
"""How many times more in each further round."""
_MARGIN = 4
_SPREAD = 16
"""Standard deviations that a part may hold more than its share. Chunks of a document, and documents of one kind, are
near to each other and lie in one part: with 6, 4 % of queries to an encyclopedia are asked a second time, and 44 %
where what they are about lies in the first of four parts; that costs more than what is listed in vain."""
_MOST_PASSED_OVER = 4
"""Times as many candidates at first, at most, for the sake of rows that are passed over: the chunks of a query's own
document are nearest to it."""

Ask = Callable[[PreparedQueries, "Wanted", np.ndarray | None], Sequence[Candidates]]
"""Gives the candidates of every part, with chunk_ids: (queries, wanted, excluded_ids [Q, 2] or None)."""


class Wanted:
    """How many candidates a search wants.

    Args:
        num_candidates: of the whole database (C of index/merge.py).
        widening: times as many as are expected to do.
    """

    def __init__(self, num_candidates: int, widening: int = 1) -> None:
        self.num_candidates = num_candidates
        self.widening = widening

    def of_part(self, share: float) -> int:
        """How many a part with this share of the chunks should list.

        What it is expected to hold of the whole's, and more, so that it is seldom asked twice.
        """
        expected = self.num_candidates * min(1.0, share)
        spread = _SPREAD * math.sqrt(expected * (1 - min(1.0, share)))
        return self.widening * (min(math.ceil(expected + spread), self.num_candidates) + _MARGIN)


def search_parts(
    queries: np.ndarray,
    k: int,
    spec: IndexSpec,
    encoder: QueryEncoder,
    ask: Ask,
    excluded_ids: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` neighbours of each query, as index/merge.py defines them.

    Where the lists that are visited hold fewer than k, more are visited, up to all of them.

    Args:
        queries: float32 [Q, D].
        k: neighbours per query.
        spec: of the database's manifest.
        encoder: for the database's codec.
        ask: reaches all parts.
        excluded_ids: int64 [Q, 2], first and last chunk_id to pass over; (-1, -1): none.

    Returns:
        distances float32 [Q, k] ascending, infinity where missing; chunk_ids int64 [Q, k], -1 where missing.
    """
    distances = np.full((len(queries), k), np.inf, np.float32)
    chunk_ids = np.full((len(queries), k), -1, np.int64)
    if not k:
        return distances, chunk_ids
    num_candidates = spec.num_candidates(k)
    nprobe, todo = min(spec.nprobe, encoder.num_lists), np.arange(len(queries))
    while len(todo):
        prepared, asked = encoder.prepare(queries[todo], nprobe), np.arange(len(todo))
        widening = 1
        if excluded_ids is not None and not spec.is_graph:  # a graph's segments see to it themselves
            widening = _first_widening(num_candidates, excluded_ids[todo])
        while len(asked):
            rows = todo[asked]
            excluded = None if excluded_ids is None else excluded_ids[rows]
            parts = ask(
                prepared[asked] if len(asked) < len(todo) else prepared, Wanted(num_candidates, widening), excluded
            )
            found = merge_candidates(parts, k, num_candidates)
            distances[rows], chunk_ids[rows] = found.distances, found.ids
            asked, widening = asked[found.unfinished], _MORE_CANDIDATES * widening
        if nprobe >= encoder.num_lists:
            break
        todo, nprobe = todo[chunk_ids[todo, -1] < 0], min(_MORE_LISTS * nprobe, encoder.num_lists)
    return distances, chunk_ids


def _first_widening(num_candidates: int, excluded_ids: np.ndarray) -> int:
    """Times as many candidates as are wanted, so that most queries are asked once."""
    passed_over = np.where(excluded_ids[:, 0] < 0, 0, excluded_ids[:, 1] - excluded_ids[:, 0] + 1)
    return 1 + min(math.ceil(float(np.median(passed_over)) / num_candidates), _MOST_PASSED_OVER)
