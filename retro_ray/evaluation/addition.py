"""What would adding documents to a database bring? Answered before they are added.

What is newly copyable (see `copyable`) is counted twice: from the neighbours that the database has, and from the
nearest among its chunks and the new ones, not reranked. In the database's held-out documents, and in the new documents
themselves, each of which is retrieved for from all the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retro_ray.config import RetrievalConfig
from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.assess import MUCH, NUM_NEIGHBOURS, SOME
from retro_ray.evaluation.copyable import newly_copyable
from retro_ray.evaluation.own_text import document_tokens
from retro_ray.evaluation.sampled_chunks import Embed, SampledChunks, choose_readers
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.text.corpus import Document


@dataclass(frozen=True)
class Reading:
    """How many tokens of some documents are newly copyable, without the new documents and with them."""

    num_documents: int
    num_tokens: int
    """Tokens that have a chunk before them, and so neighbours."""
    num_without: int
    num_with: int

    @property
    def share_without(self) -> float:
        return self.num_without / max(1, self.num_tokens)

    @property
    def share_with(self) -> float:
        return self.num_with / max(1, self.num_tokens)


@dataclass(frozen=True)
class Addition:
    """What new documents promise."""

    num_chunks: int
    """Of the new documents."""
    held_out: Reading
    """The database's held-out documents."""
    new: Reading
    """The new documents."""

    @property
    def verdict(self) -> str:
        """One sentence."""
        read, name = max(
            ((self.held_out, "its held-out documents"), (self.new, "texts like the new ones")),
            key=lambda pair: pair[0].share_with - pair[0].share_without,
        )
        gain = read.share_with - read.share_without
        size = "Little to gain" if gain < SOME else "Some gain" if gain < MUCH else "Much to gain"
        return (
            f"{size}: in {name}, {read.share_with:.1%} of the next tokens would stand in retrieved neighbours and not "
            f"in the text itself, {read.share_without:.1%} without this addition."
        )


@dataclass(frozen=True)
class _Text:
    """A document that is read."""

    tokens_T: np.ndarray
    keys_LD: np.ndarray
    own_rows: np.ndarray | None
    """Its chunks among the new ones, which are no neighbours of its own."""


def assess_addition(
    database: Database,
    documents: Sequence[Document],
    embed: Embed,
    *,
    max_queries: int = 4_000,
    seed: int = 0,
) -> Addition:
    """Assess what `documents` would bring to `database`.

    Args:
        database: as it is.
        documents: new ones, few enough to embed whole.
        embed: for keys, as the database's.
        max_queries: neighbours are searched for about so many chunks of either kind of text.
        seed: of the choice of what is read.

    Raises:
        InputError: there are no documents.
    """
    new = SampledChunks(documents, database.tokenizer, embed, database.chunk_length)
    retriever = LocalRetriever.open(database, RetrievalConfig(mmap=True), pinned=True)
    rng = np.random.default_rng(seed)

    def read(texts: Iterator[_Text]) -> Reading:
        readings = [_read(text, database, retriever, new) for text in texts]
        sums = (sum(column) for column in zip(*readings, strict=True)) if readings else (0, 0, 0)
        return Reading(len(readings), *sums)

    held_out = iter(()) if database.validation is None else _held_out(database.validation, max_queries, rng)
    return Addition(len(new), read(held_out), read(_new(new, max_queries, rng)))


def _held_out(store: ChunkStore, max_queries: int, rng: np.random.Generator) -> Iterator[_Text]:
    for document in choose_readers(store.document_num_chunks, max_queries, rng):
        tokens_T = document_tokens(store, int(document))
        tokens_T[0] = -1  # where a document starts, nothing is copied
        yield _Text(tokens_T, store.keys[np.arange(*store.document_rows(int(document)))], None)


def _new(new: SampledChunks, max_queries: int, rng: np.random.Generator) -> Iterator[_Text]:
    for document in choose_readers(new.num_chunks, max_queries, rng):
        rows = new.rows(int(document))
        yield _Text(new.tokens(int(document)), new.keys[rows], rows)


def _read(text: _Text, database: Database, retriever: LocalRetriever, new: SampledChunks) -> tuple[int, int, int]:
    """Tokens that may be copied, and those that are newly copyable without and with the new documents."""
    m = database.chunk_length
    distances, chunk_ids = retriever.search_ids(np.asarray(text.keys_LD), NUM_NEIGHBOURS)
    tokens_LKR, mask_LKR = database.neighbour_tokens(chunk_ids)
    of_database = np.where(mask_LKR, tokens_LKR, -1)
    new_distances, rows = new.nearest(text.keys_LD, NUM_NEIGHBOURS, text.own_rows)
    both = np.concatenate([of_database, new.continued(rows)], axis=1)
    order = np.argsort(np.concatenate([distances, new_distances], axis=1), axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
    nearest = np.take_along_axis(both, order[..., None], axis=1)
    without, with_new = (int(newly_copyable(text.tokens_T, some, m).sum()) for some in (of_database, nearest))
    return len(text.tokens_T) - m, without, with_new
