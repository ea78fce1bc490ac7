"""What generation asks of retrieval: chunks of sequences, and their neighbours as the model reads them.

Shape letters: B batch, L chunks, K neighbours, R neighbour length (2M).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from retro_ray.generation.request import CitedNeighbour, Rerank
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.text.tokenizer import TextTokenizer


class ChunkSearch(Protocol):
    """What generation asks of retrieval; a ChunkRetriever does it.

    A request that chooses how to rerank passes `rerank` on as one more keyword.
    """

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int, /) -> NeighbourSet:
        """The `k` nearest chunks of each chunk of token ids."""
        ...


@dataclass(frozen=True)
class ChunkQuery:
    """A chunk of one sequence that neighbours are wanted for."""

    chunk: int
    """Counted from 1."""
    tokens: tuple[int, ...]
    """Those to search for: all of the chunk, or its beginning."""
    num_neighbours: int
    rerank: Rerank | None


@dataclass(frozen=True)
class RetrievedChunk:
    """A chunk of one sequence and what was found for it."""

    query: ChunkQuery
    neighbours: NeighbourSet
    """Of this one query."""


def retrieve(search: ChunkSearch, queries: Sequence[ChunkQuery]) -> list[RetrievedChunk]:
    """The neighbours of every query, in as few calls as may be.

    Queries that ask for different numbers of neighbours go into one call each: an approximate
    index may answer otherwise when asked for more, and no request may change another's answer.
    """
    alike: dict[tuple[int, Rerank | None], list[int]] = defaultdict(list)
    for place, query in enumerate(queries):
        alike[query.num_neighbours, query.rerank].append(place)
    retrieved: dict[int, RetrievedChunk] = {}
    for (num_neighbours, rerank), places in alike.items():
        options: dict[str, Any] = {} if rerank is None else {"rerank": rerank}
        found = search.retrieve_chunks([queries[place].tokens for place in places], num_neighbours, **options)
        for row, place in enumerate(places):
            retrieved[place] = RetrievedChunk(queries[place], _row(found, row))
    return [retrieved[place] for place in range(len(queries))]


def _row(found: NeighbourSet, row: int) -> NeighbourSet:
    """The answer to one query; a copy, so that it does not keep the others' in memory."""
    only = slice(row, row + 1)
    return NeighbourSet(
        distances=found.distances[only].copy(),
        chunk_ids=found.chunk_ids[only].copy(),
        tokens=found.tokens[only].copy(),
        mask=found.mask[only].copy(),
        documents=found.documents[only],
        missing_shards=found.missing_shards,
    )


def neighbour_tensors(
    retrieved: Sequence[Sequence[RetrievedChunk]], neighbour_length: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What was retrieved, as the model takes it: tokens int64 and mask bool, [B, L, K, R].

    Takes for each of B rows what was retrieved for its L, or fewer, chunks; all is masked where
    nothing was. None if nothing was at all.
    """
    answers = [answer for row in retrieved for answer in row]
    if not answers:
        return None, None
    num_neighbours = max(answer.neighbours.tokens.shape[1] for answer in answers)
    num_chunks = max(len(row) for row in retrieved)
    shape = (len(retrieved), num_chunks, num_neighbours, neighbour_length)
    tokens_BLKR, mask_BLKR = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(retrieved):
        for u, answer in enumerate(row):
            k = answer.neighbours.tokens.shape[1]
            tokens_BLKR[b, u, :k] = torch.tensor(answer.neighbours.tokens[0])
            mask_BLKR[b, u, :k] = torch.tensor(answer.neighbours.mask[0])
    return tokens_BLKR.to(device), mask_BLKR.to(device)


def cited_neighbours(
    found: NeighbourSet, row: int, chunk_length: int, tokenizer: TextTokenizer
) -> tuple[CitedNeighbour, ...]:
    """What was found for query number `row`, for people; places without a neighbour are left out."""
    cited = []
    for k, document in enumerate(found.documents[row]):
        if document is None:
            continue
        tokens, mask = found.tokens[row, k], found.mask[row, k]
        here, after = slice(None, chunk_length), slice(chunk_length, None)
        text, continuation = tokenizer.decode_batch([tokens[part][mask[part]].tolist() for part in (here, after)])
        cited.append(
            CitedNeighbour(
                chunk_id=int(found.chunk_ids[row, k]),
                document_id=document.id,
                title=document.title,
                source=document.source,
                distance=float(found.distances[row, k]),
                text=text,
                continuation=continuation,
            )
        )
    return tuple(cited)
