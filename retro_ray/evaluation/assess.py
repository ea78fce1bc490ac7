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

from retro_ray.database.format import IndexSpec
from retro_ray.errors import InputError
from retro_ray.evaluation.copyable import NGRAM_LENGTH, newly_copyable
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.search import search_parts
from retro_ray.index.shard import IndexShard
from retro_ray.index.tune import ask_parts
from retro_ray.text.chunking import ChunkedDocument, chunk_document, chunk_texts
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import TextTokenizer

NUM_NEIGHBOURS = 2
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
    sample = _Sample(chunked, first_row, keys, chunk_length)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(chunked))
    sizes = np.diff(first_row)[order]
    chosen = np.sort(order[np.cumsum(sizes) - sizes < max_queries])
    counts: dict[str, list[CopyableShare]] = defaultdict(list)
    found: list[tuple[int, Example]] = []
    for number in chosen:
        if len(chunked[number].tokens) < 2:
            continue
        share, copied = sample.look_at(int(number), tokenizer, rng)
        counts[group_of(documents[number])].append(share)
        if copied is not None:
            found.append(copied)
    groups = {name: _sum(shares) for name, shares in counts.items()}
    found.sort(key=lambda pair: -pair[0])
    return Assessment(
        num_documents=len(documents),
        num_chunks=len(keys),
        total=_sum(groups.values()),
        groups=dict(sorted(groups.items(), key=lambda item: -item[1].num_tokens)),
        examples=tuple(example for _, example in found[:num_examples]),
    )


class _Sample:
    """The chunks of all documents by row; tokens are negative where nothing can be copied: padding, document starts."""

    def __init__(
        self, chunked: Sequence[ChunkedDocument], first_row: np.ndarray, keys: np.ndarray, chunk_length: int
    ) -> None:
        self._chunked, self._first_row, self._keys, self._chunk_length = chunked, first_row, keys, chunk_length
        self._tokens = np.concatenate([document.tokens for document in chunked])
        lengths = np.concatenate([document.lengths for document in chunked])
        self._tokens[np.arange(self._tokens.shape[1]) >= lengths[:, None]] = -1
        self._tokens[first_row[:-1], 0] = -1
        self._ends = np.zeros(len(self._tokens), bool)
        self._ends[first_row[1:] - 1] = True
        self._spec = IndexSpec(factory="Flat")
        self._encoder = QueryEncoder(self._spec, None)
        self._ask = ask_parts([(0, 1.0, IndexShard(self._spec, keys))])

    def look_at(
        self, number: int, tokenizer: TextTokenizer, rng: np.random.Generator
    ) -> tuple[CopyableShare, tuple[int, Example] | None]:
        """What of one document is newly copyable; length and example of its longest such stretch."""
        first, stop = int(self._first_row[number]), int(self._first_row[number + 1])
        rows = np.arange(first, stop)
        own = np.tile([first, stop - 1], (len(rows), 1))
        distances, nearest = search_parts(self._keys[rows], NUM_NEIGHBOURS, self._spec, self._encoder, self._ask, own)
        tokens_T = self._tokens[rows].reshape(-1)[: int(self._chunked[number].lengths.sum())]
        copyable = newly_copyable(tokens_T, self._continued(nearest), self._chunk_length)
        elsewhere = np.delete(np.arange(len(self._keys)), rows)
        by_chance = newly_copyable(tokens_T, self._continued(rng.choice(elsewhere, nearest.shape)), self._chunk_length)
        share = CopyableShare(1, len(tokens_T) - self._chunk_length, int(copyable.sum()), int(by_chance.sum()))
        start, stop = _longest_stretch(copyable)
        if stop == start:
            return share, None
        chunk = start // self._chunk_length - 1
        # Of the chunk's neighbours, the one that holds most of the stretch.
        held = [
            newly_copyable(tokens_T, self._continued(nearest[:, [column]]), self._chunk_length)[start:stop].sum()
            for column in range(nearest.shape[1])
        ]
        column = int(np.argmax(held))
        owner = int(np.searchsorted(self._first_row, nearest[chunk, column], side="right")) - 1
        text = tokenizer.decode(tokens_T[start - NGRAM_LENGTH + 1 : stop])
        example = Example(self._chunked[number].id, text, self._chunked[owner].id, float(distances[chunk, column]))
        return share, (stop - start, example)

    def _continued(self, rows: np.ndarray) -> np.ndarray:
        """[N, F]: int64 [..., 2M]; F is negative behind a document's end."""
        following = np.where(self._ends[rows][..., None], -1, self._tokens[np.minimum(rows + 1, len(self._ends) - 1)])
        both = np.concatenate([self._tokens[rows], following], axis=-1)
        return np.where(rows[..., None] < 0, -1, both)  # fewer chunks elsewhere than neighbours wanted


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
