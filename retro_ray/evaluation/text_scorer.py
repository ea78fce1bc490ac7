"""Scoring any text with one checkpoint, in this process: what jobs/evaluate.py does for documents, by the same
windows, neighbours and batches, and what multiple-choice questions need beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_ray.building.add_segment import Embedder
from retro_ray.config import Precision
from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.bits_per_byte import RetrievalMode, document_groups, score_tokens
from retro_ray.evaluation.own_text import NeighbourSearch, ScoredText, first_neighbours, write_own_text
from retro_ray.evaluation.scores import TokenScores
from retro_ray.model.retro import RetroModel
from retro_ray.text.chunking import ChunkedDocument, chunk_document, chunk_tokens
from retro_ray.text.corpus import Document


class TextScorer:
    """Log-likelihoods of texts that no database holds.

    Args:
        model: on the device to compute on.
        database: whose tokenizer and chunking the model has, and that neighbours come from.
        load_embedder: gives the embedder that the database was built with; called once, if at all.
        mode: retrieval on, off, or random.
        num_neighbours: per chunk; default: as many as in training.
        batch_size: windows per forward pass.
        precision: arithmetic of the forward pass.
    """

    def __init__(
        self,
        model: RetroModel,
        database: Database,
        load_embedder: Callable[[], Embedder],
        *,
        mode: RetrievalMode = "on",
        num_neighbours: int | None = None,
        batch_size: int = 8,
        precision: Precision = "auto",
    ) -> None:
        self._model = model
        self._database = database
        self._load_embedder = load_embedder
        self._mode: RetrievalMode = mode
        self._num_neighbours = model.config.num_neighbours if num_neighbours is None else num_neighbours
        self._batch_size = batch_size
        self._precision: Precision = precision

    def score_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Log-likelihood of each text as a document of its own, in nats: float64 [n], none above 0."""
        if not texts:
            return np.empty(0)
        tokenizer, m = self._database.tokenizer, self._database.chunk_length
        with tempfile.TemporaryDirectory() as folder:
            text = self._write(folder, [chunk_document(_named(i, text), tokenizer, m) for i, text in enumerate(texts)])
            store = text.open(m)
            scores = self._score(text, store)
            return -np.bincount(_document_of(store, scores), weights=scores.nats, minlength=len(texts))

    def score_continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """How likely continuations are, each after its context.

        Args:
            pairs: token ids of context and continuation; a document-start token before the context is added where
                there is none.

        Returns:
            Of each pair, the continuation's log-likelihood in nats, and whether each of its tokens is the likeliest.
        """
        if not pairs:
            return []
        bos_id, m = self._database.tokenizer.bos_id, self._database.chunk_length
        documents, num_context = [], []
        for number, (context, continuation) in enumerate(pairs):
            tokens = [*([] if list(context[:1]) == [bos_id] else [bos_id]), *context, *continuation]
            documents.append(chunk_tokens(_named(number, ""), np.array(tokens), np.zeros(len(tokens), np.int64), m))
            num_context.append(len(tokens) - len(continuation))
        with tempfile.TemporaryDirectory() as folder:
            text = self._write(folder, documents)
            store = text.open(m)
            only = np.zeros(store.num_chunks * m, bool)
            for first, count, (_, continuation) in zip(store.document_first_row, num_context, pairs, strict=True):
                only[first * m + count : first * m + count + len(continuation)] = True
            scores = self._score(text, store, only)
            owner = _document_of(store, scores)
            nats = np.bincount(owner, weights=scores.nats, minlength=len(pairs))
            num_unlikely = np.bincount(owner, weights=~scores.is_likeliest, minlength=len(pairs))
        return [(-float(own), count == 0) for own, count in zip(nats, num_unlikely.tolist(), strict=True)]

    def _write(self, folder: str, documents: Sequence[ChunkedDocument]) -> ScoredText:
        search = self._search if self._mode == "on" and self._num_neighbours and self._model.config.cca_layers else None
        return write_own_text(Path(folder), documents, self._database, search, self._num_neighbours)

    @cached_property
    def _search(self) -> NeighbourSearch:
        return NeighbourSearch(self._database, self._load_embedder())

    def _score(self, text: ScoredText, store: ChunkStore, only: np.ndarray | None = None) -> TokenScores:
        neighbours = None if text.neighbours is None else first_neighbours(text.neighbours, self._num_neighbours)
        documents = np.arange(store.num_documents)
        parts = [
            score_tokens(
                self._model,
                store,
                self._database,
                group,
                mode=self._mode,
                only=only,
                num_neighbours=self._num_neighbours,
                batch_size=self._batch_size,
                precision=self._precision,
                neighbours=neighbours,
            )
            for group in document_groups(documents, store.document_num_chunks)
        ]
        return TokenScores.concatenated(parts)


def _named(number: int, text: str) -> Document:
    return Document(id=str(number), title="", source="", text=text)


def _document_of(store: ChunkStore, scores: TokenScores) -> np.ndarray:
    """int64 [n]: the document of each token."""
    return np.searchsorted(store.document_first_row, scores.positions // store.chunk_length, side="right") - 1
