"""What it means to retrieve: the protocol, its answer, and text in front of it.

Distances are squared L2, ascending; ties are broken by chunk_id, so that an answer does not depend
on how the database is sharded. Reranking (rerank.py) then puts them into another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from retro_ray.config import RerankMethod
from retro_ray.database.store import Database, DocumentRef
from retro_ray.errors import MismatchError
from retro_ray.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    # Shard actors import this module: without torch they start sooner and take a third of the memory.
    import torch

    from retro_ray.embedding import ChunkEmbedder


@dataclass(frozen=True)
class NeighbourSet:
    """The k nearest chunks of Q queries, with all that a reader needs of them.

    A place without a neighbour has chunk_id -1, distance infinity, an all-False mask and document
    None.
    """

    distances: np.ndarray
    """float32 [Q, K], ascending unless reranked."""
    chunk_ids: np.ndarray
    """int64 [Q, K]."""
    tokens: np.ndarray
    """int64 [Q, K, R], R = 2m: the chunk N and its continuation F."""
    mask: np.ndarray
    """bool [Q, K, R]: True where a token is real."""
    documents: tuple[tuple[DocumentRef | None, ...], ...]
    """[Q][K]."""
    missing_shards: tuple[int, ...] = ()
    """Shards that did not answer; empty for a complete answer."""
    generation: int = 0
    """Of the database that was searched: all of an answer is of one."""


class Retriever(Protocol):
    """Finds the nearest chunks of query embeddings in one retrieval database."""

    def search(
        self,
        queries: np.ndarray,
        k: int,
        chunks: Sequence[Sequence[int]] | None = None,
        rerank: RerankMethod | None = None,
    ) -> NeighbourSet:
        """The `k` neighbours of each query.

        Args:
            queries: float32 [Q, D].
            k: neighbours per query.
            chunks: the token ids that were embedded; without them, nothing is reranked.
            rerank: how; default: as the retriever is set.
        """
        ...

    def search_ids(
        self, queries: np.ndarray, k: int, excluded_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances float32 [Q, K] and chunk_ids int64 [Q, K] alone, complete and not reranked.

        Args:
            queries: float32 [Q, D].
            k: neighbours per query.
            excluded_ids: int64 [Q, 2], first and last chunk_id of the query's own document (-1, -1
                for none). Such chunks are passed over and others found in their place, until there
                are k or the database is exhausted.
        """
        ...


class ChunkRetriever:
    """A Retriever for text: embeds what is asked, in the form in which chunks were embedded."""

    def __init__(self, tokenizer: TextTokenizer, embedder: ChunkEmbedder, retriever: Retriever) -> None:
        self.tokenizer = tokenizer
        self._embedder = embedder
        self._retriever = retriever

    @classmethod
    def open(cls, database: Database, retriever: Retriever, device: str | torch.device | None = None) -> ChunkRetriever:
        """A ChunkRetriever with the tokenizer and the embedder that `database` was built with.

        Raises:
            MismatchError: the embedder of that name has other weights here.
        """
        return cls(database.tokenizer, open_embedder(database, device), retriever)

    def retrieve_texts(self, texts: Sequence[str], k: int, rerank: RerankMethod | None = None) -> NeighbourSet:
        """The `k` neighbours of each text; `rerank` as in Retriever.search."""
        return self._retriever.search(
            self._embedder.embed(texts), k, [self.tokenizer.encode(text).tolist() for text in texts], rerank
        )

    def retrieve_chunks(
        self, chunks: Sequence[Sequence[int]], k: int, rerank: RerankMethod | None = None
    ) -> NeighbourSet:
        """The `k` neighbours of each chunk of token ids; `rerank` as in Retriever.search."""
        keys = self._embedder.embed(self.tokenizer.decode_batch(chunks))
        return self._retriever.search(keys, k, chunks, rerank)


def open_embedder(database: Database, device: str | torch.device | None = None) -> ChunkEmbedder:
    """The embedder that `database` was built with.

    Raises:
        MismatchError: the embedder of that name has other weights here.
    """
    from retro_ray.embedding import ChunkEmbedder

    manifest = database.manifest
    embedder = ChunkEmbedder(manifest.embedder_name, device=device)
    if embedder.fingerprint != manifest.embedder_fingerprint:
        raise MismatchError(
            f"the embedder {manifest.embedder_name} here has fingerprint {embedder.fingerprint}, the database in "
            f"{database.directory} was built with {manifest.embedder_fingerprint}: install that one, or rebuild "
            "the database with jobs/index.py"
        )
    return embedder
