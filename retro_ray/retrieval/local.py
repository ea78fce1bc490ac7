"""Retrieval inside one process: shards side by side, no Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_ray.database.store import ChunkStore, Database
from retro_ray.index.build import read_index
from retro_ray.index.merge import nearest
from retro_ray.index.shard import IndexShard
from retro_ray.retrieval.retriever import NeighbourSet


class ShardSearcher:
    """One shard as it is searched: its index, its chunks, and both in one answer."""

    def __init__(self, index: IndexShard, store: ChunkStore) -> None:
        self._index = index
        self._store = store

    @classmethod
    def open(cls, database: Database, shard: int) -> ShardSearcher:
        """Load a shard, after a check that its files are those which were committed.

        Raises:
            DatabaseError: a file is missing or damaged; names it.
        """
        partition = database.manifest.segments[shard]
        database.check_files(partition.index, partition.chunks, partition.documents)
        index = read_index(database.directory / partition.index)
        return cls(IndexShard(index, database.manifest.index), database.segments[shard])

    def search_ids(
        self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Retriever.search_ids`, over this shard."""
        base = self._store.chunk_id_base
        excluded_rows = None
        if excluded_ids is not None:
            inside = (excluded_ids[:, :1] >= base) & (excluded_ids[:, :1] < base + self._store.num_chunks)
            excluded_rows = np.where(inside, excluded_ids - base, -1)
        distances, rows = self._index.search(queries, k, excluded_rows)
        return distances, np.where(rows < 0, -1, rows + base)

    def search(self, queries: np.ndarray, k: int) -> NeighbourSet:
        """As `Retriever.search`, over this shard."""
        distances, chunk_ids = self.search_ids(queries, k)
        rows = np.where(chunk_ids < 0, -1, chunk_ids - self._store.chunk_id_base)
        tokens, mask = self._store.neighbour_tokens(rows.reshape(-1))
        shape = (*rows.shape, tokens.shape[-1])
        documents = tuple(
            tuple(
                None if row < 0 else self._store.document_ref(int(self._store.document_of(np.array([row]))[0]))
                for row in query_rows
            )
            for query_rows in rows
        )
        return NeighbourSet(distances, chunk_ids, tokens.reshape(shape), mask.reshape(shape), documents)


class LocalRetriever:
    """A Retriever over shards in this process: for tests, tools and small databases."""

    def __init__(self, searchers: Sequence[ShardSearcher]) -> None:
        self._searchers = searchers

    @classmethod
    def open(cls, database: Database) -> LocalRetriever:
        return cls([ShardSearcher.open(database, shard) for shard in range(len(database.manifest.segments))])

    def search_ids(
        self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        answers = [searcher.search_ids(queries, k, excluded_ids) for searcher in self._searchers]
        return merge_ids(answers, k)

    def search(self, queries: np.ndarray, k: int) -> NeighbourSet:
        return merge_answers([searcher.search(queries, k) for searcher in self._searchers], k)


def merge_ids(answers: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of what the shards found: distances float32 [Q, k] and chunk_ids int64 [Q, k]."""
    distances = np.concatenate([distances for distances, _ in answers], axis=1)
    chunk_ids = np.concatenate([chunk_ids for _, chunk_ids in answers], axis=1)
    order = nearest(distances, chunk_ids, k)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(chunk_ids, order, 1)


def merge_answers(answers: Sequence[NeighbourSet], k: int, missing_shards: tuple[int, ...] = ()) -> NeighbourSet:
    """The k nearest of what the shards found, with their tokens and documents."""
    distances = np.concatenate([answer.distances for answer in answers], axis=1)
    chunk_ids = np.concatenate([answer.chunk_ids for answer in answers], axis=1)
    order = nearest(distances, chunk_ids, k)
    tokens = np.concatenate([answer.tokens for answer in answers], axis=1)
    mask = np.concatenate([answer.mask for answer in answers], axis=1)
    documents = [
        tuple(document for answer in answers for document in answer.documents[query]) for query in range(len(order))
    ]
    return NeighbourSet(
        distances=np.take_along_axis(distances, order, 1),
        chunk_ids=np.take_along_axis(chunk_ids, order, 1),
        tokens=np.take_along_axis(tokens, order[..., None], 1),
        mask=np.take_along_axis(mask, order[..., None], 1),
        documents=tuple(
            tuple(row[column] for column in columns) for row, columns in zip(documents, order, strict=True)
        ),
        missing_shards=missing_shards,
    )
