"""Documents cut into chunks, with keys: what may be copied from them, without a database."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from retro_ray.errors import InputError
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.search import search_parts
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import IndexSpec
from retro_ray.index.tune import ask_parts
from retro_ray.text.chunking import ChunkedDocument, chunk_document, chunk_texts
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import TextTokenizer

Embed = Callable[[Sequence[str]], np.ndarray]
"""From texts to keys, float32 [n, D]."""


class SampledChunks:
    """The chunks of some documents by row, searched exactly.

    Args:
        documents: a sample small enough to embed whole.
        tokenizer: for chunks.
        embed: for keys.
        chunk_length: M.

    Raises:
        InputError: there is no document.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: TextTokenizer, embed: Embed, chunk_length: int
    ) -> None:
        if not documents:
            raise InputError("no documents to assess: give files that hold some")
        self.documents: list[ChunkedDocument] = [chunk_document(one, tokenizer, chunk_length) for one in documents]
        self._first_row = np.cumsum([0, *(len(one.tokens) for one in self.documents)], dtype=np.int64)
        self._tokens = np.concatenate([one.tokens for one in self.documents])
        lengths = np.concatenate([one.lengths for one in self.documents])
        # Negative where nothing can be copied: padding, document starts.
        self._tokens[np.arange(chunk_length) >= lengths[:, None]] = -1
        self._tokens[self._first_row[:-1], 0] = -1
        self._ends = np.zeros(len(self._tokens), bool)
        self._ends[self._first_row[1:] - 1] = True
        self.keys = embed([text for one in self.documents for text in chunk_texts(one, tokenizer)])
        self._spec = IndexSpec(factory="Flat")
        self._encoder = QueryEncoder(self._spec, None)
        self._ask = ask_parts([(0, 1.0, IndexShard(self._spec, self.keys))])

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def num_chunks(self) -> np.ndarray:
        """Of every document, int64."""
        return np.diff(self._first_row)

    def rows(self, document: int) -> np.ndarray:
        """Those of a document's chunks."""
        return np.arange(self._first_row[document], self._first_row[document + 1])

    def tokens(self, document: int) -> np.ndarray:
        """int64 [T]: those of a document, its start negative."""
        return self._tokens[self.rows(document)].reshape(-1)[: int(self.documents[document].lengths.sum())]

    def document_of(self, row: int) -> ChunkedDocument:
        """The document that a chunk is of."""
        return self.documents[int(np.searchsorted(self._first_row, row, side="right")) - 1]

    def nearest(self, keys: np.ndarray, k: int, passed_over: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Distances float32 [L, k] and rows int64 [L, k] of the nearest chunks, but for a range of rows."""
        own = None if passed_over is None else np.tile([passed_over[0], passed_over[-1]], (len(keys), 1))
        return search_parts(np.ascontiguousarray(keys), k, self._spec, self._encoder, self._ask, own)

    def continued(self, rows: np.ndarray) -> np.ndarray:
        """[N, F]: int64 [..., 2M]; F is negative behind a document's end, and both where the row is."""
        following = np.where(self._ends[rows][..., None], -1, self._tokens[np.minimum(rows + 1, len(self._ends) - 1)])
        both = np.concatenate([self._tokens[rows], following], axis=-1)
        return np.where(rows[..., None] < 0, -1, both)  # fewer chunks elsewhere than neighbours wanted


def choose_readers(num_chunks: np.ndarray, max_chunks: int, rng: np.random.Generator) -> np.ndarray:
    """Documents in random order until they have about so many chunks; of those, the ones with a second chunk."""
    order = rng.permutation(len(num_chunks))
    sizes = num_chunks[order]
    chosen = np.sort(order[np.cumsum(sizes) - sizes < max_chunks])
    return chosen[num_chunks[chosen] > 1]
