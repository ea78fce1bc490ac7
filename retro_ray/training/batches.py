"""Which windows a training step sees: a pure function of seed and step.

All training documents, in an order drawn anew for every epoch, form one stream of chunks. It is cut
into windows of L chunks (the last one of an epoch may be short), and the windows are visited in
another drawn order, so that a long document does not fill whole batches. Every chunk is seen once
per epoch. No state is kept between steps: a resumed run, or one on another number of workers,
continues with exactly the batches an undisturbed one would have seen.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np

from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.training.windows import NO_CHUNK, Batch, ChunkTable, WindowReader

_DRAWS = {"documents": 0, "windows": 1, "dropout": 2}


def _generator(seed: int, draw: Literal["documents", "windows", "dropout"], number: int) -> np.random.Generator:
    """The random numbers of one draw; independent between seeds, kinds of draw and numbers."""
    return np.random.default_rng([seed, _DRAWS[draw], number])


class EpochOrder:
    """Windows of one epoch: which chunks, in which order."""

    def __init__(self, table: ChunkTable, num_chunks_per_window: int, seed: int, epoch: int) -> None:
        self._documents = _generator(seed, "documents", epoch).permutation(len(table.document_first))
        self._ends = np.cumsum(table.document_num_chunks[self._documents])
        self._table = table
        self._num_chunks_per_window = num_chunks_per_window
        num_windows = -(-table.num_chunks // num_chunks_per_window)
        self._windows = _generator(seed, "windows", epoch).permutation(num_windows)

    def __len__(self) -> int:
        return len(self._windows)

    def chunks_BL(self, start: int, stop: int) -> np.ndarray:
        """Chunks of the windows start..stop-1 of this epoch; NO_CHUNK behind the stream's end."""
        width = self._num_chunks_per_window
        position = self._windows[start:stop, None] * width + np.arange(width)
        inside = position < self._table.num_chunks
        position = np.minimum(position, self._table.num_chunks - 1)
        turn = np.searchsorted(self._ends, position, side="right")
        document = self._documents[turn]
        before = self._ends[turn] - self._table.document_num_chunks[document]
        return np.where(inside, self._table.document_first[document] + position - before, NO_CHUNK)


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of a training step."""

    step: int
    """Counted from 0."""
    batch: Batch
    num_targets: int
    """Target tokens of the step over all workers: what the loss is divided by. Every real token is followed by a
    target (its successor or the document's end), so that this is also the number of real tokens."""


class TrainingBatches:
    """The batches of a training run, as worker `rank` of `world_size` sees them."""

    def __init__(
        self,
        reader: WindowReader,
        *,
        num_chunks: int,
        batch_size: int,
        seed: int,
        retrieval_dropout: float | Callable[[int], float] = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`num_chunks` is L, `batch_size` counts windows over all workers; retrieval dropout may depend on the step.

        Raises:
            DatabaseError: there is nothing to train on.
            ConfigError: there are more workers than windows in a batch.
        """
        if reader.table.num_chunks == 0:
            raise DatabaseError("the database has no training chunks: build one from more text with jobs/index.py")
        if batch_size < world_size:
            raise ConfigError(
                f"--batch-size is {batch_size}, less than the {world_size} workers: raise it, or lower --num-workers"
            )
        self._reader = reader
        self._num_chunks = num_chunks
        self._batch_size = batch_size
        self._seed = seed
        self._retrieval_dropout = retrieval_dropout
        share = np.array_split(np.arange(batch_size), world_size)[rank]
        self._mine = slice(int(share[0]), int(share[-1]) + 1)
        self._epoch_order: tuple[int, EpochOrder] | None = None

    @property
    def num_windows_per_epoch(self) -> int:
        return -(-self._reader.table.num_chunks // self._num_chunks)

    def at(self, step: int) -> StepBatch:
        """This worker's share of step `step`, counted from 0."""
        chunks_BL = self.global_chunks(step)
        mine = chunks_BL[self._mine]
        dropout = self._retrieval_dropout
        share = dropout(step) if callable(dropout) else dropout
        sees = _generator(self._seed, "dropout", step).random(self._batch_size) >= share
        batch = self._reader.read(mine, use_neighbours_B=sees[self._mine])
        return StepBatch(step=step, batch=batch, num_targets=self._reader.num_targets(chunks_BL))

    def global_chunks(self, step: int) -> np.ndarray:
        """int64 [batch_size, L]: the chunks of all workers' windows."""
        first, stop = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while first < stop:
            epoch, start = divmod(first, self.num_windows_per_epoch)
            count = min(stop - first, self.num_windows_per_epoch - start)
            parts.append(self._order(epoch).chunks_BL(start, start + count))
            first += count
        return np.concatenate(parts)

    def _order(self, epoch: int) -> EpochOrder:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, EpochOrder(self._reader.table, self._num_chunks, self._seed, epoch)
        return self._epoch_order[1]


class Prefetcher:
    """Steps start..stop-1 of `batches`, the next ones read by a thread while one is computed with.

    An error of the thread is raised where its batch would have come. Leaving the `with` block, at
    the end or by an error, stops the thread.
    """

    def __init__(self, batches: TrainingBatches, start: int, stop: int, *, depth: int = 2) -> None:
        self._batches = batches
        self._steps = range(start, stop)
        self._queue: queue.Queue[StepBatch | Exception] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="batch-prefetcher", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def __iter__(self) -> Iterator[StepBatch]:
        for _ in self._steps:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def _read(self) -> None:
        for step in self._steps:
            try:
                item: StepBatch | Exception = self._batches.at(step)
            except Exception as error:  # whatever it is, the consumer must get it
                item = error
            while not self._stopping.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopping.is_set() or isinstance(item, Exception):
                return
