"""Bits per byte: how many bits a model needs for a byte of text it has not seen.

    bits per byte = sum of nats over the text's tokens / (ln 2 * UTF-8 bytes of the text)

It does not depend on the tokenizer. Every token of a document counts once; the first one is
predicted from the document-start token alone, and the document's end is not text and not counted.

Documents never meet in a window. A document is read in windows of L chunks with a stride of L // 2
chunks (paper, section 4.1: half of the sequence length): the first window is scored whole, of the
others only what the one before did not reach, so that all but a document's beginning is predicted
from at least half a window of its own text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from retro_ray.database.store import ChunkStore, Database
from retro_ray.model.retro import RetroModel
from retro_ray.training.step import Precision, arithmetic
from retro_ray.training.windows import (
    NO_CHUNK,
    NO_TARGET,
    ChunkTable,
    NeighbourSource,
    WindowReader,
    stored_neighbours,
)

RetrievalMode = Literal["on", "off", "random"]
"""With the stored neighbours, without any, or with random chunks of the database in their place."""

# Positions whose logits over the whole vocabulary exist at the same time.
_POSITIONS_PER_READ_OUT = 2048


@dataclass(frozen=True)
class BitsPerByte:
    """Sums that bits per byte is made of; those of parts add up to that of the whole."""

    nats: float = 0.0
    """Negative log-likelihood of the text's tokens."""
    num_tokens: int = 0
    """Tokens scored."""
    num_bytes: int = 0
    """UTF-8 bytes of the text they stand for."""

    def __add__(self, other: BitsPerByte) -> BitsPerByte:
        return BitsPerByte(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    @property
    def value(self) -> float:
        """Bits per byte; NaN where there was no text."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan


@dataclass(frozen=True)
class ChunkScores:
    """The same sums for every chunk of some documents, in the order of `rows`."""

    rows: np.ndarray
    """int64 [n]: rows of the chunk store."""
    nats: np.ndarray
    """float64 [n]: of the chunk's own tokens, whichever position predicted them."""
    num_tokens: np.ndarray
    """int64 [n]."""
    num_bytes: np.ndarray
    """int64 [n]."""

    @property
    def total(self) -> BitsPerByte:
        return BitsPerByte(float(self.nats.sum()), int(self.num_tokens.sum()), int(self.num_bytes.sum()))


def score_documents(
    model: RetroModel,
    store: ChunkStore,
    database: Database,
    documents: Sequence[int] | np.ndarray,
    *,
    mode: RetrievalMode,
    num_neighbours: int | None = None,
    batch_size: int = 8,
    precision: Precision = "auto",
    neighbours: NeighbourSource | None = None,
    seed: int = 0,
) -> BitsPerByte:
    """Bits per byte of whole documents; see `score_chunks` for the arguments."""
    return score_chunks(
        model,
        store,
        database,
        documents,
        mode=mode,
        num_neighbours=num_neighbours,
        batch_size=batch_size,
        precision=precision,
        neighbours=neighbours,
        seed=seed,
    ).total


@torch.no_grad()
def score_chunks(
    model: RetroModel,
    store: ChunkStore,
    database: Database,
    documents: Sequence[int] | np.ndarray,
    *,
    mode: RetrievalMode,
    num_neighbours: int | None = None,
    batch_size: int = 8,
    precision: Precision = "auto",
    neighbours: NeighbourSource | None = None,
    seed: int = 0,
) -> ChunkScores:
    """Score every chunk of whole documents.

    Args:
        model: on the device to compute on.
        store: the partition that holds the documents, usually the validation split.
        database: where neighbours' tokens come from.
        documents: rows of the store's documents; each at most once.
        mode: retrieval on, off, or random.
        num_neighbours: per chunk. Default: as many as the model was trained with.
        batch_size: windows per forward pass.
        precision: arithmetic of the forward pass.
        neighbours: neighbours to use with "on" in place of the stored ones.
        seed: of the random neighbours.

    Raises:
        ConfigError: fewer neighbours than `num_neighbours` are stored.
    """
    table = ChunkTable((store,))
    count = model.config.num_neighbours if num_neighbours is None else num_neighbours
    if mode == "off" or count == 0 or not model.config.cca_layers:
        source = None
    elif mode == "random":
        source = _random_neighbours(table, database, count, seed)
    else:
        source = neighbours or stored_neighbours(table, database, count)
    reader = WindowReader(table, database, neighbours=source, end_target=NO_TARGET)
    device = next(model.parameters()).device
    nats, num_tokens = np.zeros(store.num_chunks), np.zeros(store.num_chunks, np.int64)
    windows = _windows(store, documents, model.config.num_chunks)
    was_training = model.training
    model.eval()
    for start in range(0, len(windows), batch_size):
        some = windows[start : start + batch_size]
        rows, losses = _score_windows(model, reader, some, arithmetic(precision, device), device)
        nats += np.bincount(rows, weights=losses, minlength=len(nats))
        num_tokens += np.bincount(rows, minlength=len(nats))
    model.train(was_training)
    spans = [np.arange(*store.document_rows(int(document))) for document in documents]
    scored = np.concatenate(spans) if spans else np.empty(0, np.int64)
    return ChunkScores(scored, nats[scored], num_tokens[scored], store.num_bytes(scored))


def choose_documents(store: ChunkStore, num_chunks: int, seed: int = 0) -> np.ndarray:
    """Documents of a store, randomly but always the same ones, until they have `num_chunks` chunks; ascending."""
    order = np.random.default_rng(seed).permutation(store.num_documents)
    before = np.cumsum(store.document_num_chunks[order]) - store.document_num_chunks[order]
    return np.sort(order[before < num_chunks])


class _Window(NamedTuple):
    first_row: int
    num_chunks: int
    num_context_chunks: int
    """Chunks at its start that another window scores."""


def _windows(store: ChunkStore, documents: Sequence[int] | np.ndarray, max_chunks: int) -> list[_Window]:
    """All windows of the documents, the longest first, so that those of a batch are alike."""
    stride = max(1, max_chunks // 2)
    windows = []
    for document in documents:
        first, stop = store.document_rows(int(document))
        windows.append(_Window(first, min(max_chunks, stop - first), 0))
        reached = first + max_chunks
        while reached < stop:
            end = min(reached + stride, stop)
            start = reached - (max_chunks - stride)
            windows.append(_Window(start, end - start, reached - start))
            reached = end
    return sorted(windows, key=lambda window: (-window.num_chunks, window.first_row))


def _score_windows(
    model: RetroModel,
    reader: WindowReader,
    windows: list[_Window],
    context: contextlib.AbstractContextManager,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Of every scored token: the row of its chunk, int64 [n], and its nats, float64 [n]."""
    m = reader.chunk_length
    column = np.arange(windows[0].num_chunks)[None, :]
    first = np.array([window.first_row for window in windows])[:, None]
    count = np.array([window.num_chunks for window in windows])[:, None]
    skipped = np.array([window.num_context_chunks for window in windows])[:, None]
    batch = reader.read(np.where(column < count, first + column, NO_CHUNK))
    position = np.arange(column.size * m)[None, :]
    asked = (batch.targets_BT.numpy() != NO_TARGET) & (position >= skipped * m)
    # The token asked for at position t stands at t + 1, perhaps in the next chunk.
    rows = np.broadcast_to(first + (position + 1) // m, asked.shape)[asked]
    batch, where = batch.to(device), torch.from_numpy(asked).to(device)
    with context:
        h_BTD = model.hidden(
            batch.tokens_BT,
            neighbours_BLKR=batch.neighbours_BLKR,
            neighbour_mask_BLKR=batch.neighbour_mask_BLKR,
            segments_BT=batch.segments_BT,
        )
        parts = zip(
            h_BTD[where].split(_POSITIONS_PER_READ_OUT),
            batch.targets_BT[where].split(_POSITIONS_PER_READ_OUT),
            strict=True,
        )
        losses = [F.cross_entropy(model.read_out(h).float(), target, reduction="none") for h, target in parts]
    return rows, torch.cat(losses).double().cpu().numpy()


def _random_neighbours(table: ChunkTable, database: Database, count: int, seed: int) -> NeighbourSource:
    """Live chunks drawn from the whole database, the same ones for a chunk whatever else is scored."""
    first, last = database.live_runs.T
    ends = np.cumsum(last - first + 1)

    def draw(chunks: np.ndarray) -> np.ndarray:
        ids = np.full((len(chunks), count), -1, np.int64)
        if not len(ends):
            return ids  # all documents are deleted
        document_of = table.document_of(chunks)
        for document in np.unique(document_of):
            shape = (int(table.document_num_chunks[document]), count)
            number = np.random.default_rng([seed, int(document)]).integers(0, ends[-1], size=shape)
            run = np.searchsorted(ends, number, side="right")
            drawn = last[run] + 1 - (ends[run] - number)
            mine = np.flatnonzero(document_of == document)
            ids[mine] = drawn[chunks[mine] - table.document_first[document]]
        return ids

    return draw
