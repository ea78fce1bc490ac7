"""Passes over new tokens as CUDA graphs.

A GPU computes such a pass in a fraction of the time in which Python asks for it, kernel by kernel. A graph is asked for
as a whole: it does again what was recorded, on the tensors that it was recorded with. What differs between two passes
of one shape are integers, which are copied into one of these tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import torch

_RECORDED_AT = 3
"""A shape that comes back so often is likely to come more often yet: recording takes as long as some ten passes."""
_MOST_GRAPHS = 64
_MOST_SHAPES = 4096

Computed = TypeVar("Computed")


class Recording(Protocol):
    """Something a GPU was asked for."""

    def __init__(self, work: Callable[[], Any], pool: Any) -> None: ...

    def replay(self) -> Any:
        """Do it again; what `work` returned, the same tensors each time."""
        ...


class CudaGraph:
    """`work` as a graph. It waits for nothing, reads and writes the same tensors each time, and can be done twice."""

    def __init__(self, work: Callable[[], Any], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        work()  # libraries prepare themselves at a first call, which cannot be recorded
        # Another thread may take memory of the same GPU meanwhile, to embed.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._result = work()

    def replay(self) -> Any:
        self._graph.replay()
        return self._result


class PassStages:
    """A pass that is asked for kernel by kernel."""

    def __init__(self, numbers: Sequence[int], device: torch.device) -> None:
        self.numbers_X = torch.tensor(numbers, dtype=torch.int64, device=device)
        """What the pass is about, int64."""

    def do(self, name: Hashable, work: Callable[[], Computed]) -> Computed:
        """A stage of the pass; equal names mean equal work, but for the numbers."""
        return work()


class RecordedStages(PassStages):
    """A pass whose stages are recorded when they are first done."""

    def __init__(self, numbers: Sequence[int], device: torch.device, record: Callable[..., Recording], pool: Any):
        super().__init__(numbers, device)
        self._record, self._pool = record, pool
        self._recordings: dict[Hashable, Recording] = {}

    def do(self, name: Hashable, work: Callable[[], Computed]) -> Computed:
        """A stage of the pass. Its tensors are the same each time, with other numbers in them."""
        recording = self._recordings.get(name)
        if recording is None:
            recording = self._recordings[name] = self._record(work, self._pool)
        return recording.replay()


class PassGraphs:
    """Passes over the tensors of one cache, each recorded when its shape has come back.

    Args:
        record: makes a recording.
    """

    def __init__(self, record: Callable[..., Recording] = CudaGraph) -> None:
        self._record = record
        self.clear()

    def clear(self) -> None:
        """Forget all: the cache's tensors are others from now on."""
        self._recorded: dict[Hashable, RecordedStages] = {}
        self._sightings: Counter[Hashable] = Counter()
        self._pool: Any = None

    @property
    def num_recorded(self) -> int:
        """Shapes of which there are recordings."""
        return len(self._recorded)

    def stages(self, shape: Hashable, numbers: Sequence[int], device: torch.device) -> PassStages:
        """Those of a pass of this shape."""
        recorded = self._recorded.get(shape)
        if recorded is not None:
            recorded.numbers_X.copy_(torch.tensor(numbers, dtype=torch.int64))
            return recorded
        self._sightings[shape] += 1
        if self._sightings[shape] < _RECORDED_AT:
            return PassStages(numbers, device)
        if len(self._recorded) == _MOST_GRAPHS or len(self._sightings) > _MOST_SHAPES:
            self.clear()
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()  # which ends with the last of its graphs
        recorded = self._recorded[shape] = RecordedStages(numbers, device, self._record, self._pool)
        return recorded
