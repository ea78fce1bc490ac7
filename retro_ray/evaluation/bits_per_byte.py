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
from collections.abc import Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict, Unpack

import numpy as np
import torch

from retro_ray.config import Precision
from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.scores import BitsPerByte, ChunkScores, PassScores, TokenScores
from retro_ray.evaluation.target_nats import target_nats
from retro_ray.model.retro import RetroModel
from retro_ray.precision import arithmetic
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

NeighbourParts = Literal["NF", "N", "F"]
"""What of the neighbours is shown: chunk and continuation, or one of them alone (paper, Table 13)."""

_CHUNKS_PER_GROUP = 512


class ScoringOptions(TypedDict):
    """How documents are scored: the keyword arguments of `score_tokens`, which says what they mean."""

    mode: RetrievalMode
    num_neighbours: NotRequired[int | None]
    batch_size: NotRequired[int]
    precision: NotRequired[Precision]
    neighbours: NotRequired[NeighbourSource | None]
    parts: NotRequired[NeighbourParts]
    seed: NotRequired[int]


def score_documents(
    model: RetroModel,
    store: ChunkStore,
    database: Database,
    documents: Sequence[int] | np.ndarray,
    **options: Unpack[ScoringOptions],
) -> BitsPerByte:
    """Bits per byte of whole documents; see `score_tokens` for the arguments."""
    return score_pass(model, store, database, documents, **options).total


def score_chunks(
    model: RetroModel,
    store: ChunkStore,
    database: Database,
    documents: Sequence[int] | np.ndarray,
    **options: Unpack[ScoringOptions],
) -> ChunkScores:
    """Score every chunk of whole documents; see `score_tokens` for the arguments."""
    return score_pass(model, store, database, documents, **options).chunks


def score_pass(
    model: RetroModel,
    store: ChunkStore,
    database: Database,
    documents: Sequence[int] | np.ndarray,
    **options: Unpack[ScoringOptions],
) -> PassScores:
    """All that is counted of one pass over whole documents; see `score_tokens` for the arguments."""
    scores = score_tokens(model, store, database, documents, **options)
    rows, (row_of, place) = _rows_of(store, documents), np.divmod(scores.positions, store.chunk_length)
    nats = np.bincount(row_of, weights=scores.nats, minlength=store.num_chunks)
    num_tokens = np.bincount(row_of, minlength=store.num_chunks)
    last = np.isin(scores.positions, last_tokens(store, documents))
    return PassScores(
        ChunkScores(rows, nats[rows], num_tokens[rows], store.num_bytes(rows)),
        place_nats=np.bincount(place, weights=scores.nats, minlength=store.chunk_length),
        place_num_tokens=np.bincount(place, minlength=store.chunk_length),
        num_last_tokens=int(last.sum()),
        num_last_right=int(scores.is_likeliest[last].sum()),
    )


@torch.no_grad()
def score_tokens(
    model: RetroModel,
    store: ChunkStore,
    database: Database,
    documents: Sequence[int] | np.ndarray,
    *,
    mode: RetrievalMode,
    only: np.ndarray | None = None,
    num_neighbours: int | None = None,
    batch_size: int = 8,
    precision: Precision = "auto",
    neighbours: NeighbourSource | None = None,
    parts: NeighbourParts = "NF",
    seed: int = 0,
) -> TokenScores:
    """Score the tokens of whole documents, all but the document-start tokens.

    Args:
        model: on the device to compute on.
        store: the partition that holds the documents, usually the validation split.
        database: where neighbours' tokens come from.
        documents: rows of the store's documents; each at most once.
        mode: retrieval on, off, or random.
        only: bool [num_chunks * m]: score these tokens alone, as in the pass over all. Default: all.
        num_neighbours: per chunk. Default: as many as the model was trained with.
        batch_size: windows per forward pass.
        precision: arithmetic of the forward pass.
        neighbours: neighbours to use with "on" in place of the stored ones.
        parts: what of the neighbours is shown; the rest is masked.
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
    windows = _windows(store, documents, model.config.num_chunks)
    if only is not None:
        windows = [window for window in windows if only[window.scored(store.chunk_length)].any()]
    was_training = model.training
    model.eval()
    scores = []
    for start in range(0, len(windows), batch_size):
        some = windows[start : start + batch_size]
        scores.append(_score_windows(model, reader, some, only, parts, arithmetic(precision, device), device))
    model.train(was_training)
    return TokenScores.concatenated(scores)


def last_tokens(store: ChunkStore, documents: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n]: the position (see TokenScores) of the last token of each document."""
    documents = np.asarray(documents, np.int64)
    rows = store.document_first_row[documents] + store.document_num_chunks[documents] - 1
    return rows * store.chunk_length + store.lengths(rows) - 1


def choose_documents(store: ChunkStore, num_chunks: int, seed: int = 0) -> np.ndarray:
    """Documents of a store, randomly but always the same ones, until they have `num_chunks` chunks; ascending."""
    order = np.random.default_rng(seed).permutation(store.num_documents)
    before = np.cumsum(store.document_num_chunks[order]) - store.document_num_chunks[order]
    return np.sort(order[before < num_chunks])


def document_groups(documents: np.ndarray, num_chunks: np.ndarray) -> list[np.ndarray]:
    """Documents in groups of about 512 chunks: what is scored together, whoever scores it.

    Args:
        documents: int64 [n].
        num_chunks: of every document of the store.
    """
    group = np.cumsum(num_chunks[documents]) // _CHUNKS_PER_GROUP
    return [documents[group == number] for number in np.unique(group)]


def num_tokens_read(store: ChunkStore, documents: Sequence[int] | np.ndarray, max_chunks: int) -> int:
    """Tokens of all windows of documents, those that are context in one and scored in another counted twice."""
    rows = [
        np.arange(window.first_row, window.first_row + window.num_chunks)
        for window in _windows(store, documents, max_chunks)
    ]
    return int(store.lengths(np.concatenate([np.empty(0, np.int64), *rows])).sum())


class _Window(NamedTuple):
    first_row: int
    num_chunks: int
    num_context_chunks: int
    """Chunks at its start that another window scores."""

    def scored(self, chunk_length: int) -> slice:
        """Positions of the tokens that it scores, some of which may be padding or another document's start."""
        first, stop = self.first_row + self.num_context_chunks, self.first_row + self.num_chunks
        return slice(first * chunk_length + 1, stop * chunk_length + 1)


def _rows_of(store: ChunkStore, documents: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n]: the chunks of documents, document after document."""
    spans = [np.arange(*store.document_rows(int(document))) for document in documents]
    return np.concatenate(spans) if spans else np.empty(0, np.int64)


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
    only: np.ndarray | None,
    neighbour_parts: NeighbourParts,
    context: contextlib.AbstractContextManager,
    device: torch.device,
) -> TokenScores:
    """The tokens that these windows score, in the order of the windows."""
    m = reader.chunk_length
    column = np.arange(windows[0].num_chunks)[None, :]
    first = np.array([window.first_row for window in windows])[:, None]
    count = np.array([window.num_chunks for window in windows])[:, None]
    skipped = np.array([window.num_context_chunks for window in windows])[:, None]
    batch = reader.read(np.where(column < count, first + column, NO_CHUNK))
    if batch.neighbour_mask_BLKR is not None and neighbour_parts != "NF":
        batch.neighbour_mask_BLKR[..., slice(m, None) if neighbour_parts == "N" else slice(m)] = False
    place = np.arange(column.size * m)[None, :]
    asked = (batch.targets_BT.numpy() != NO_TARGET) & (place >= skipped * m)
    # The token asked for at place t of a window stands at t + 1, perhaps behind the window's end.
    positions = first * m + place + 1
    if only is not None:
        asked[asked] = only[positions[asked]]
    batch, where = batch.to(device), torch.from_numpy(asked).to(device)
    with context:
        output = model.output(
            batch.tokens_BT,
            neighbours_BLKR=batch.neighbours_BLKR,
            neighbour_mask_BLKR=batch.neighbour_mask_BLKR,
            segments_BT=batch.segments_BT,
        )
        nats, is_likeliest = target_nats(model, output[where], batch.targets_BT[where])
    return TokenScores(positions[asked], nats.double().cpu().numpy(), is_likeliest.cpu().numpy())


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
