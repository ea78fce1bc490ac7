"""Will retrieval help on these documents? Answered before anything is trained.

Chunks of a sample are embedded, the neighbours of some documents' chunks are found among all other
documents, and what of their following chunks is newly copyable is counted (see `copyable`), beside
the same count with random neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from retro_ray.errors import InputError
from retro_ray.evaluation.copyable import NGRAM_LENGTH, newly_copyable
from retro_ray.text.chunking import ChunkedDocument, chunk_document, chunk_texts
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import TextTokenizer

NUM_NEIGHBOURS = 2
_QUERIES_PER_BLOCK = 512
_MUCH, _SOME = 0.15, 0.02
"""New copyable shares from which retrieval gained about 9 % and more, and about 1 %, in bits per byte."""


@dataclass(frozen=True)
class CopyableShare:
    """How many of some tokens are newly copyable from nearest and from random neighbours."""

    num_documents: int
    num_tokens: int
    """Tokens that have a chunk before them, and so neighbours."""
    num_copyable: int
    num_copyable_from_random: int

    @property
    def share(self) -> float:
        return self.num_copyable / max(1, self.num_tokens)

    @property
    def random_share(self) -> float:
        return self.num_copyable_from_random / max(1, self.num_tokens)


@dataclass(frozen=True)
class Example:
    """A stretch of text that a neighbour holds word for word."""

    document: str
    text: str
    neighbour: str
    """Document that the neighbour is of."""
    distance: float


@dataclass(frozen=True)
class Assessment:
    """What retrieval promises on a sample of documents."""

    num_documents: int
    num_chunks: int
    total: CopyableShare
    groups: dict[str, CopyableShare]
    """By document group, the largest first."""
    examples: tuple[Example, ...]

    @property
    def verdict(self) -> str:
        """One sentence."""
        share, chance = self.total.share, self.total.random_share
        found = f"{share:.1%} of the next tokens stand in retrieved neighbours and not in the text itself"
        if share - chance < _SOME:
            return f"Little to gain: {found}. More documents, or ones closer to each other, may change that."
        if share - chance < _MUCH:
            return f"Some gain: {found}. Expect one to a few percent in bits per byte."
        return f"Much to gain: {found}. Expect about ten percent in bits per byte or more."


def assess(
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    embed: Callable[[Sequence[str]], np.ndarray],
    *,
    chunk_length: int = 64,
    max_queries: int = 4_000,
    num_examples: int = 3,
    group_of: Callable[[Document], str],
    seed: int = 0,
) -> Assessment:
    """Assess documents against each other: each is retrieved for from all the others.

    Args:
        documents: a random sample, small enough to embed whole.
        tokenizer: for chunks and n-grams.
        embed: from texts to keys, float32 [n, D].
        chunk_length: m.
        max_queries: neighbours are searched for about so many chunks, of documents chosen at random.
        num_examples: longest copyable stretches to show, of different documents.
        group_of: the group that a document is reported under.
        seed: of the choice of documents and of the random neighbours.

    Raises:
        InputError: there are fewer than two documents, or none with a second chunk.
    """
    chunked = [chunk_document(document, tokenizer, chunk_length) for document in documents]
    first_row = np.cumsum([0, *(len(document.tokens) for document in chunked)], dtype=np.int64)
    if len(chunked) < 2 or all(len(document.tokens) < 2 for document in chunked):
        raise InputError(
            f"{len(chunked)} documents of {first_row[-1]} chunks are too little to assess: give at least two, "
            f"one of them with more than {chunk_length} tokens"
        )
    keys = embed([text for document in chunked for text in chunk_texts(document, tokenizer)])
    neighbour_tokens = _NeighbourTokens(chunked, first_row)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(chunked))
    sizes = np.diff(first_row)[order]
    chosen = np.sort(order[np.cumsum(sizes) - sizes < max_queries])

    def example(
        number: int, nearest: np.ndarray, distances: np.ndarray, tokens_T: np.ndarray, start: int, stop: int
    ) -> Example:
        chunk = start // chunk_length - 1
        # Of the chunk's neighbours, the one that holds most of the stretch.
        held = [
            newly_copyable(tokens_T, neighbour_tokens.continued(nearest[:, [column]]), chunk_length)[start:stop].sum()
            for column in range(nearest.shape[1])
        ]
        column = int(np.argmax(held))
        owner = int(np.searchsorted(first_row, nearest[chunk, column], side="right")) - 1
        text = tokenizer.decode(tokens_T[start - NGRAM_LENGTH + 1 : stop])
        return Example(chunked[number].id, text, chunked[owner].id, float(distances[chunk, column]))

    counts: dict[str, list[CopyableShare]] = defaultdict(list)
    found: list[tuple[int, Example]] = []
    for number in chosen:
        document = chunked[number]
        if len(document.tokens) < 2:
            continue
        rows = np.arange(int(first_row[number]), int(first_row[number + 1]))
        distances, nearest = _nearest_elsewhere(keys, rows)
        tokens_T = neighbour_tokens.text(rows).reshape(-1)[: int(document.lengths.sum())]
        copyable = newly_copyable(tokens_T, neighbour_tokens.continued(nearest), chunk_length)
        elsewhere = np.delete(np.arange(len(keys)), rows)
        random_rows = rng.choice(elsewhere, size=nearest.shape)
        by_chance = newly_copyable(tokens_T, neighbour_tokens.continued(random_rows), chunk_length)
        share = CopyableShare(1, len(tokens_T) - chunk_length, int(copyable.sum()), int(by_chance.sum()))
        counts[group_of(documents[number])].append(share)
        start, stop = _longest_stretch(copyable)
        if stop > start:
            found.append((stop - start, example(number, nearest, distances, tokens_T, start, stop)))
    groups = {name: _sum(shares) for name, shares in counts.items()}
    found.sort(key=lambda pair: -pair[0])
    return Assessment(
        num_documents=len(documents),
        num_chunks=len(keys),
        total=_sum(groups.values()),
        groups=dict(sorted(groups.items(), key=lambda item: -item[1].num_tokens)),
        examples=tuple(example for _, example in found[:num_examples]),
    )


class _NeighbourTokens:
    """Tokens of chunks by row, negative where nothing can be copied: padding and document starts."""

    def __init__(self, chunked: Sequence[ChunkedDocument], first_row: np.ndarray) -> None:
        self._tokens = np.concatenate([document.tokens for document in chunked])
        lengths = np.concatenate([document.lengths for document in chunked])
        self._tokens[np.arange(self._tokens.shape[1]) >= lengths[:, None]] = -1
        self._tokens[first_row[:-1], 0] = -1
        self._ends = np.zeros(len(self._tokens), bool)
        self._ends[first_row[1:] - 1] = True

    def text(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, M]."""
        return self._tokens[rows]

    def continued(self, rows: np.ndarray) -> np.ndarray:
        """[N, F]: int64 [..., 2M]; F is negative behind a document's end."""
        following = np.where(self._ends[rows][..., None], -1, self._tokens[np.minimum(rows + 1, len(self._ends) - 1)])
        return np.concatenate([self._tokens[rows], following], axis=-1)


def _nearest_elsewhere(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared L2 and rows of the nearest keys outside `rows`, which are consecutive: [n, NUM_NEIGHBOURS]."""
    distances, nearest = [], []
    squares = np.einsum("nd,nd->n", keys, keys)
    for start in range(0, len(rows), _QUERIES_PER_BLOCK):
        queries = keys[rows[start : start + _QUERIES_PER_BLOCK]]
        scores = squares - 2 * (queries @ keys.T)
        scores[:, rows[0] : rows[-1] + 1] = np.inf
        k = min(NUM_NEIGHBOURS, len(keys) - len(rows))
        block = np.argpartition(scores, k - 1, axis=1)[:, :k]
        block = np.take_along_axis(block, np.argsort(np.take_along_axis(scores, block, 1), axis=1), 1)
        own_squares = np.einsum("nd,nd->n", queries, queries)
        distances.append(np.maximum(np.take_along_axis(scores, block, 1) + own_squares[:, None], 0))
        nearest.append(block)
    return np.concatenate(distances), np.concatenate(nearest)


def _longest_stretch(flags: np.ndarray) -> tuple[int, int]:
    """Start and stop of the longest run of True; (0, 0) where there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(stops - starts))
    return int(starts[longest]), int(stops[longest])


def _sum(shares: Iterable[CopyableShare]) -> CopyableShare:
    shares = list(shares)
    return CopyableShare(
        sum(share.num_documents for share in shares),
        sum(share.num_tokens for share in shares),
        sum(share.num_copyable for share in shares),
        sum(share.num_copyable_from_random for share in shares),
    )
