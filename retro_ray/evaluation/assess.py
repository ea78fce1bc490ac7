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
from retro_ray.evaluation.sampled_chunks import Embed, SampledChunks, choose_readers
from retro_ray.text.corpus import Document
from retro_ray.text.near_duplicates import NearDocuments, shingles
from retro_ray.text.tokenizer import TextTokenizer

NUM_NEIGHBOURS = 2
MUCH, SOME = 0.05, 0.005
"""New copyable shares above those by chance from which retrieval gains a small model ten percent and more, and a few
percent, in bits per byte: 0.078 of a sample went with 18 %, 0.008 with 2.5 %, 0.002 with 1.5 %."""


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
    near_duplicates: tuple[tuple[str, str], ...]
    """Ids of documents that are nearly the same: what is copied from these says little."""

    @property
    def verdict(self) -> str:
        """One sentence."""
        share, chance = self.total.share, self.total.random_share
        found = f"{share:.1%} of the next tokens stand in retrieved neighbours and not in the text itself"
        if share - chance < SOME:
            return f"Little to gain: {found}. Expect about a percent; more documents may change that."
        if share - chance < MUCH:
            return f"Some gain: {found}. Expect a few percent in bits per byte."
        return f"Much to gain: {found}. Expect ten percent in bits per byte or more."


def assess(
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    embed: Embed,
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
        embed: for keys.
        chunk_length: m.
        max_queries: neighbours are searched for about so many chunks, of documents chosen at random.
        num_examples: longest copyable stretches to show, of different documents.
        group_of: the group that a document is reported under.
        seed: of the choice of documents and of the random neighbours.

    Raises:
        InputError: there are fewer than two documents, or none with a second chunk.
    """
    sample = SampledChunks(documents, tokenizer, embed, chunk_length)
    if len(documents) < 2 or sample.num_chunks.max() < 2:
        raise InputError(
            f"{len(documents)} documents of {len(sample)} chunks are too little to assess: give at least two, "
            f"one of them with more than {chunk_length} tokens"
        )
    rng = np.random.default_rng(seed)
    counts: dict[str, list[CopyableShare]] = defaultdict(list)
    found: list[tuple[int, Example]] = []
    for number in choose_readers(sample.num_chunks, max_queries, rng):
        share, copied = _look_at(sample, int(number), tokenizer, chunk_length, rng)
        counts[group_of(documents[number])].append(share)
        if copied is not None:
            found.append(copied)
    groups = {name: _sum(shares) for name, shares in counts.items()}
    found.sort(key=lambda pair: -pair[0])
    return Assessment(
        num_documents=len(documents),
        num_chunks=len(sample),
        total=_sum(groups.values()),
        groups=dict(sorted(groups.items(), key=lambda item: -item[1].num_tokens)),
        examples=tuple(example for _, example in found[:num_examples]),
        near_duplicates=near_duplicates(sample),
    )


def near_duplicates(sample: SampledChunks) -> tuple[tuple[str, str], ...]:
    """Ids of pairs of documents that are nearly the same (13-grams, Jaccard of 0.8 or more)."""
    grams = [shingles(sample.tokens(number)[1:]) for number in range(len(sample.documents))]
    near = NearDocuments((str(number), one) for number, one in enumerate(grams))
    pairs = {
        (number, int(other.name)) for number, one in enumerate(grams) for other in near.near(one)
    }  # each of a pair finds the other
    return tuple((sample.documents[a].id, sample.documents[b].id) for a, b in sorted(pairs) if a < b)


def _look_at(
    sample: SampledChunks, number: int, tokenizer: TextTokenizer, chunk_length: int, rng: np.random.Generator
) -> tuple[CopyableShare, tuple[int, Example] | None]:
    """What of one document is newly copyable; length and example of its longest such stretch."""
    rows, tokens_T = sample.rows(number), sample.tokens(number)
    distances, nearest = sample.nearest(sample.keys[rows], NUM_NEIGHBOURS, rows)
    copyable = newly_copyable(tokens_T, sample.continued(nearest), chunk_length)
    elsewhere = np.delete(np.arange(len(sample)), rows)
    by_chance = newly_copyable(tokens_T, sample.continued(rng.choice(elsewhere, nearest.shape)), chunk_length)
    share = CopyableShare(1, len(tokens_T) - chunk_length, int(copyable.sum()), int(by_chance.sum()))
    start, stop = _longest_stretch(copyable)
    if stop == start:
        return share, None
    chunk = start // chunk_length - 1
    # Of the chunk's neighbours, the one that holds most of the stretch.
    held = [
        newly_copyable(tokens_T, sample.continued(nearest[:, [column]]), chunk_length)[start:stop].sum()
        for column in range(nearest.shape[1])
    ]
    column = int(np.argmax(held))
    owner = sample.document_of(int(nearest[chunk, column]))
    text = tokenizer.decode(tokens_T[start - NGRAM_LENGTH + 1 : stop])
    example = Example(sample.documents[number].id, text, owner.id, float(distances[chunk, column]))
    return share, (stop - start, example)


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
