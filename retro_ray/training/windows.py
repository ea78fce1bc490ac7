"""From chunk numbers to what the model is fed: tokens, targets, segments and neighbours.

A window is L consecutive chunks of a stream of documents. Shape letters: B windows, L chunks, M
chunk length, T = L*M tokens, K neighbours, R = 2M neighbour length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from retro_ray.database.deleted import DeletedDocuments
from retro_ray.database.format import Manifest
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import ConfigError

NO_TARGET = -100
NO_CHUNK = -1


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes. All tensors on the same device."""

    tokens_BT: torch.Tensor
    """int64; 0 on padding."""
    targets_BT: torch.Tensor
    """int64: the next token of the same document; NO_TARGET where nothing is to be predicted."""
    segments_BT: torch.Tensor
    """int64: which document of the window a token belongs to; -1 on padding."""
    neighbours_BLKR: torch.Tensor | None
    """int64: [N, F] of every chunk's neighbours; None where retrieval is off."""
    neighbour_mask_BLKR: torch.Tensor | None
    """bool: True where a neighbour's token is real and may be seen."""

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def rows(self, start: int, stop: int) -> Batch:
        """Windows start..stop-1."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        neighbours, mask = self.neighbours_BLKR, self.neighbour_mask_BLKR
        return Batch(
            tokens_BT=change(self.tokens_BT),
            targets_BT=change(self.targets_BT),
            segments_BT=change(self.segments_BT),
            neighbours_BLKR=None if neighbours is None else change(neighbours),
            neighbour_mask_BLKR=None if mask is None else change(mask),
        )


class ChunkTable:
    """The chunks of some partitions under one numbering: 0.., partition after partition.

    Rows of one document are consecutive. Whole documents are looked up by binary search in arrays
    of one number per document. Deleted documents keep their numbers, and are in none of the arrays.
    """

    def __init__(self, stores: tuple[ChunkStore, ...], deleted: DeletedDocuments | None = None) -> None:
        """`deleted` is left out; the validation split has nothing deleted."""
        self._stores = stores
        self._first_of_store = np.cumsum([0, *(store.num_chunks for store in stores)])[:-1]
        firsts, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for store, first in zip(stores, self._first_of_store, strict=True):
            rows, num_chunks = store.document_first_row, store.document_num_chunks
            if deleted:
                live = ~deleted.contain(store.chunk_id_base + rows)
                rows, num_chunks = rows[live], num_chunks[live]
            firsts.append(rows + first)
            counts.append(num_chunks)
        self.document_first = np.concatenate(firsts)
        """int64 [num_documents], ascending: the first chunk of each document."""
        self.document_num_chunks = np.concatenate(counts)
        """int64 [num_documents]."""
        self.num_chunks = int(self.document_num_chunks.sum())

    def tokens(self, chunks: np.ndarray) -> np.ndarray:
        return self._gather(chunks, ChunkStore.tokens)

    def lengths(self, chunks: np.ndarray) -> np.ndarray:
        return self._gather(chunks, ChunkStore.lengths)

    def num_bytes(self, chunks: np.ndarray) -> np.ndarray:
        return self._gather(chunks, ChunkStore.num_bytes)

    def stored_neighbours(self, chunks: np.ndarray) -> np.ndarray:
        """int64 [n, K]: the stored neighbours, nearest first, -1 where there is none."""
        return self._gather(chunks, lambda store, rows: store.neighbours.gather("chunk_ids", rows))

    def document_of(self, chunks: np.ndarray) -> np.ndarray:
        """int64 [n]: the document of each chunk."""
        return np.searchsorted(self.document_first, chunks, side="right") - 1

    def _gather(self, chunks: np.ndarray, read: Callable[[ChunkStore, np.ndarray], np.ndarray]) -> np.ndarray:
        if len(self._stores) == 1:
            return read(self._stores[0], chunks)
        store_of = np.searchsorted(self._first_of_store, chunks, side="right") - 1
        # A store without chunks shares its first number with the next one; "right" finds the last of them.
        out: np.ndarray | None = None
        for store in np.unique(store_of):
            chosen = np.flatnonzero(store_of == store)
            values = read(self._stores[store], chunks[chosen] - self._first_of_store[store])
            if out is None:
                out = np.empty((len(chunks), *values.shape[1:]), values.dtype)
            out[chosen] = values
        if out is None:
            return read(self._stores[0], chunks)
        return out


NeighbourSource = Callable[[np.ndarray], np.ndarray]
"""From chunk numbers of a table, int64 [n], to the chunk_ids of their neighbours, int64 [n, K]."""


def require_stored_neighbours(manifest: Manifest, num_neighbours: int) -> None:
    """Check that a database stores as many neighbours per chunk as are asked for.

    Raises:
        ConfigError: it stores fewer.
    """
    stored = manifest.num_neighbours
    if num_neighbours > stored:
        raise ConfigError(
            f"--num-neighbours is {num_neighbours}, the database stores {stored} per chunk: use at most "
            f"{stored}, or rebuild it with jobs/index.py --num-neighbours {num_neighbours}"
        )


def stored_neighbours(table: ChunkTable, database: Database, num_neighbours: int) -> NeighbourSource | None:
    """The first `num_neighbours` of the neighbours stored with the chunks that are not deleted; None for 0.

    Raises:
        ConfigError: the database stores fewer neighbours per chunk.
    """
    require_stored_neighbours(database.manifest, num_neighbours)
    if num_neighbours == 0:
        return None
    return lambda chunks: database.without_deleted(table.stored_neighbours(chunks))[:, :num_neighbours]


class WindowReader:
    """Assembles windows of chunks of one `ChunkTable`, with neighbours from the database.

    The price of chunk-aligned windows: a document's last chunk is padded, so that some tokens of a
    window (half a chunk per document, on average) are computed for nothing.
    """

    def __init__(
        self, table: ChunkTable, database: Database, *, neighbours: NeighbourSource | None, end_target: int
    ) -> None:
        """`neighbours` is None for retrieval off; `end_target` is asked for behind a document's last token."""
        self.table = table
        self.chunk_length = database.chunk_length
        self._database = database
        self._neighbours_of = neighbours
        self._end_target = end_target

    def read(self, chunks_BL: np.ndarray, *, use_neighbours_B: np.ndarray | None = None) -> Batch:
        """The batch of the windows `chunks_BL`.

        Args:
            chunks_BL: int64 numbers of `table`, NO_CHUNK where a window has no chunk.
            use_neighbours_B: bool; windows that see no neighbours at all are False. Default: all see.
        """
        present = chunks_BL >= 0
        chunks = chunks_BL[present]
        lengths, document, continued = self._describe(chunks)
        segments_BL = np.empty(chunks_BL.shape, np.int64)
        document_BL = np.full(chunks_BL.shape, -1, np.int64)
        document_BL[present] = document
        changes = document_BL[:, 1:] != document_BL[:, :-1]
        segments_BL[:, 0] = 0
        segments_BL[:, 1:] = np.cumsum(changes, axis=1)
        segments_BL[~present] = -1
        tokens_BT, targets_BT, real_BLM = self._tokens(chunks_BL, present, chunks, lengths, continued)
        segments_BT = np.where(real_BLM, segments_BL[:, :, None], -1).reshape(tokens_BT.shape)
        neighbours, mask = self._neighbours(present, chunks, segments_BL, use_neighbours_B)
        return Batch(
            tokens_BT=torch.from_numpy(tokens_BT),
            targets_BT=torch.from_numpy(targets_BT),
            segments_BT=torch.from_numpy(segments_BT),
            neighbours_BLKR=neighbours,
            neighbour_mask_BLKR=mask,
        )

    def num_targets(self, chunks: np.ndarray) -> int:
        """How many tokens the chunks ask to predict: every real token has a successor or the document's end."""
        return int(self.table.lengths(chunks[chunks >= 0]).sum())

    def _describe(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Length, document and "the document goes on" of each chunk."""
        document = self.table.document_of(chunks)
        end = self.table.document_first[document] + self.table.document_num_chunks[document]
        return self.table.lengths(chunks), document, chunks + 1 < end

    def _tokens(
        self,
        chunks_BL: np.ndarray,
        present: np.ndarray,
        chunks: np.ndarray,
        lengths: np.ndarray,
        continued: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        m = self.chunk_length
        real = np.arange(m)[None, :] < lengths[:, None]
        tokens = np.where(real, self.table.tokens(chunks), 0)
        # What follows the chunk's last real token: the next chunk's first token, in the window or not, or the end.
        following = np.full(len(chunks), self._end_target, np.int64)
        following[continued] = self.table.tokens(chunks[continued] + 1)[:, 0]
        targets = np.full(tokens.shape, NO_TARGET, np.int64)
        targets[:, :-1] = np.where(real[:, 1:], tokens[:, 1:], NO_TARGET)
        targets[np.arange(len(chunks)), lengths - 1] = following
        shape = (*chunks_BL.shape, m)
        tokens_BLM, real_BLM = np.zeros(shape, np.int64), np.zeros(shape, bool)
        targets_BLM = np.full(shape, NO_TARGET, np.int64)
        tokens_BLM[present], targets_BLM[present], real_BLM[present] = tokens, targets, real
        flat = (len(chunks_BL), -1)
        return tokens_BLM.reshape(flat), targets_BLM.reshape(flat), real_BLM

    def _neighbours(
        self,
        present: np.ndarray,
        chunks: np.ndarray,
        segments_BL: np.ndarray,
        use_neighbours_B: np.ndarray | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._neighbours_of is None:
            return None, None
        ids = self._neighbours_of(chunks)
        ids_BLK = np.full((*segments_BL.shape, ids.shape[1]), -1, np.int64)
        ids_BLK[present] = ids
        # A chunk's neighbours are for the chunk after it. Where that one belongs to another document they are of no
        # use, and might even hold its text: they are dropped, though the chunk's own last token could have seen them.
        seen_BL = present.copy()
        seen_BL[:, :-1] &= segments_BL[:, :-1] == segments_BL[:, 1:]
        if use_neighbours_B is not None:
            seen_BL &= use_neighbours_B[:, None]
        tokens, mask = self._database.neighbour_tokens(np.where(seen_BL[:, :, None], ids_BLK, -1))
        return torch.from_numpy(tokens), torch.from_numpy(mask)
