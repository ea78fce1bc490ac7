"""Neighbours that share words with the query first: what the embedding finds, reordered by token overlap.

The paper's model gains most where it can copy (section 4.4): a neighbour with the query's rare words
is worth more to it than one that is merely about the same thing. So of the chunks that the dense
search finds nearest, those with the highest overlap are kept:

    overlap(q, c) = sum of weight(t) over the distinct tokens t that q and c share
                  + sum of weight(t) + weight(u) over the distinct pairs (t, u) of consecutive tokens they share
    weight(t)     = ln(1 + (N - n(t) + 0.5) / (n(t) + 0.5))

with N the number of chunks and n(t) the number of those that hold t: BM25's weights (Robertson and
Zaragoza 2009), without its counts, as no token says much more for being repeated within 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_ray.config import RerankMethod
from retro_ray.database.store import Database
from retro_ray.database.token_statistics import read_token_statistics
from retro_ray.errors import DatabaseError

_TABLE_ENTRIES = 1 << 20
"""Of the tables of a block of queries: what stays in a processor's cache."""
_STEPS = 256
_MAX_QUERY_TOKENS = 512
"""An embedder reads no more of a text either."""


@dataclass(frozen=True)
class Chunks:
    """Chunks as padded tokens."""

    tokens: np.ndarray
    """int64 [..., m]."""
    lengths: np.ndarray
    """int64 [...]: real tokens of each."""

    def __getitem__(self, rows: slice) -> Chunks:
        return Chunks(self.tokens[rows], self.lengths[rows])

    @property
    def is_real(self) -> np.ndarray:
        """Which places hold a token: bool [..., m]."""
        return np.arange(self.tokens.shape[-1]) < self.lengths[..., None]


class OverlapScorer:
    """Token overlap of queries with their candidates, by the token frequencies of one database.

    Args:
        num_holding: int64 [V], how many chunks hold each token; tokens that are no text may have all.
        num_chunks: of the database (N).
    """

    def __init__(self, num_holding: np.ndarray, num_chunks: int) -> None:
        num_holding = np.minimum(np.asarray(num_holding, np.float64), num_chunks)
        weights = np.log1p((num_chunks - num_holding + 0.5) / (num_holding + 0.5))
        # Steps of 1/256: then sums in float32 are exact, and no score depends on the order of its sum.
        self._weights = (np.rint(_STEPS * weights) / _STEPS).astype(np.float32)

    def score(self, queries: Chunks, candidates: Chunks) -> np.ndarray:
        """Overlap float32 [Q, C] of queries [Q, m] with their candidates [Q, C, m']; higher is better."""
        num_queries, width = queries.tokens.shape
        scores = np.zeros(candidates.tokens.shape[:2], np.float32)
        block_size = max(1, _TABLE_ENTRIES // max(len(self._weights), (width + 1) ** 2))
        for start in range(0, num_queries, block_size):
            block = slice(start, start + block_size)
            scores[block] = self._score_block(queries[block], candidates[block])
        return scores

    def _score_block(self, queries: Chunks, candidates: Chunks) -> np.ndarray:
        """Tokens are named by where the query first has them; the width of a chunk means that it has not."""
        width = queries.tokens.shape[1]
        weights = self._weights[queries.tokens]
        own = _first_places(queries.tokens, queries.is_real, len(self._weights))
        query_places = np.where(queries.is_real, _look_up(own, queries.tokens), width)
        places = _look_up(own, candidates.tokens)
        places[~candidates.is_real] = width
        scores = _sum_of_shared(places, weights)
        # The same once more, with pairs in place of tokens, named by the places of both.
        base = width + 1
        query_pairs = query_places[:, :-1] * base + query_places[:, 1:]
        own = _first_places(query_pairs, queries.is_real[:, 1:], base * base)
        pairs = _look_up(own, places[..., :-1] * base + places[..., 1:])
        return scores + _sum_of_shared(pairs, weights[:, :-1] + weights[:, 1:])


def _first_places(terms: np.ndarray, is_real: np.ndarray, num_terms: int) -> np.ndarray:
    """int16 [Q, num_terms + 1]: where in each row of `terms` [Q, T] a term first stands, T if nowhere."""
    num_rows, width = terms.shape
    places = np.full((num_rows, num_terms + 1), width, np.int16)
    backwards = np.where(is_real, terms, num_terms)[:, ::-1]  # of equal terms, what is assigned last stays
    places[np.arange(num_rows)[:, None], backwards] = np.arange(width)[::-1]
    return places


def _look_up(table: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """int64, of the shape of `terms` [Q, ...]: what each row of `table` [Q, N] has for them."""
    first = table.shape[1] * np.arange(len(table)).reshape(-1, *[1] * (terms.ndim - 1))
    return table.reshape(-1).take(terms + first).astype(np.int64)


def _sum_of_shared(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [Q, C]: the weights [Q, T] of the distinct places that `places` [Q, C, T'] names, T for none."""
    num_queries, num_candidates, _ = places.shape
    width = weights.shape[1]
    named = np.zeros((num_queries * num_candidates, width + 1), np.float32)
    first = np.arange(num_queries * num_candidates) * (width + 1)
    named.reshape(-1)[(places.reshape(len(named), -1) + first[:, None]).reshape(-1)] = 1
    named = named.reshape(num_queries, num_candidates, width + 1)[..., :width]
    return np.matmul(named, weights[:, :, None])[..., 0]


class Reranker:
    """Reorders what a dense search of one database found.

    Args:
        scorer: of the database.
        num_candidates: how many of the nearest chunks it chooses from.
    """

    def __init__(self, scorer: OverlapScorer, num_candidates: int) -> None:
        self._scorer = scorer
        self.num_candidates = num_candidates

    @classmethod
    def of(cls, database: Database, method: RerankMethod, num_candidates: int) -> Reranker | None:
        """The reranker by `method`; None where that is `none`.

        Raises:
            DatabaseError: the database has no token statistics, or they are damaged.
        """
        if method == "none":
            return None
        path = database.manifest.token_statistics
        if path is None:
            raise DatabaseError(
                f"the database in {database.directory} has no token statistics, which rerank=overlap needs: "
                "rebuild it with jobs/index.py, or set rerank to none"
            )
        num_holding, num_chunks = read_token_statistics(database.directory / path)
        for special in (database.tokenizer.bos_id, database.tokenizer.eos_id):
            num_holding[special] = num_chunks  # it is no text, and not to be matched
        return cls(OverlapScorer(num_holding, num_chunks), num_candidates)

    def order(
        self, database: Database, queries: Chunks, distances: np.ndarray, chunk_ids: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` candidates of each query that overlap with it most, ties by distance, then by chunk_id.

        Args:
            database: that they are from.
            queries: [Q, m].
            distances: float32 [Q, C], ascending, as the dense search gave them.
            chunk_ids: int64 [Q, C], -1 where there is none.
            k: how many to keep.

        Returns:
            distances float32 [Q, k], no longer ascending, and chunk_ids int64 [Q, k].
        """
        scores = self._scorer.score(queries, chunks_of(database, chunk_ids))
        order = np.argsort(np.where(chunk_ids < 0, np.inf, -scores), axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(chunk_ids, order, 1)


def chunks_of(database: Database, chunk_ids: np.ndarray) -> Chunks:
    """The tokens of chunks of any segment; no tokens where chunk_id is -1."""
    segment_of, row_of = database.locate(chunk_ids.reshape(-1))
    tokens = np.zeros((chunk_ids.size, database.chunk_length), np.int64)
    lengths = np.zeros(chunk_ids.size, np.int64)
    for segment in np.unique(segment_of[segment_of >= 0]):
        chosen = np.flatnonzero(segment_of == segment)
        store = database.segments[segment]
        tokens[chosen], lengths[chosen] = store.tokens(row_of[chosen]), store.lengths(row_of[chosen])
    return Chunks(tokens.reshape(*chunk_ids.shape, -1), lengths.reshape(chunk_ids.shape))


def pad_chunks(chunks: Sequence[Sequence[int]]) -> Chunks:
    """Chunks of token ids, [Q][...], as one array; of very long ones, the beginning."""
    lengths = np.array([min(len(chunk), _MAX_QUERY_TOKENS) for chunk in chunks], np.int64)
    tokens = np.zeros((len(chunks), int(lengths.max(initial=1))), np.int64)
    for row, chunk in enumerate(chunks):
        tokens[row, : lengths[row]] = chunk[: lengths[row]]
    return Chunks(tokens, lengths)
