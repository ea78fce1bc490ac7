"""A graph over the keys of one segment: SymphonyQG of the RaBitQ library, faster than codes and far larger.

Every key has edges to some dozens of keys near it, with codes of theirs that are scanned at once. A search
walks from one nearest row to the next, with so many of the best in view, until none of them leads to a nearer
one. What it lists is ranked by distances computed from the keys, as in an exact index: a coarse distance is the
distance, and the number of candidates is the number of neighbours. So segments with a graph and segments that
are searched exactly, because they are small, go together.

There is no codec. A graph is its segment's own, and which rows it misses depends on what else the segment holds:
unlike with codes, the same keys in other segments may give other neighbours, of the recall that was measured for
the segments as they are. Nor are two graphs over the same keys the same: the library draws random rotations, and
takes no seed. But one graph gives a query one answer, whatever the batch and the number of threads.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss import loader

from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.index.exact import ExactKeys, squared_distances
from retro_ray.index.merge import Candidates
from retro_ray.index.spec import GRAPH, IndexSpec

MIN_DIM = 64
"""What the library rotates has no fewer dimensions."""
MIN_ROWS = 2_048
"""A segment with fewer is compared as a whole in about the time of a walk (32 microseconds in batches, where a walk
takes 25), and has no graph to build."""
_EF_CONSTRUCTION = 400
_EXACT_FROM = 16
"""Comparing so many rows takes no longer than keeping one more in view: a wider walk would be slower than no walk."""
_ROWS_WHEN_TUNED, _ROWS_FOR_AS_MANY_AGAIN = 14, 20
"""Rows that are listed for 10 neighbours (`Wanted(10).of_part(1)`), and how many more need a walk twice as wide: 50
neighbours need one of 200 rows for the recall that 10 have with one of 70, and 100 neighbours one of 380."""
_QUERIES_PER_THREAD = 32
"""With fewer, a thread that waits for its next ones costs more than it brings."""


def require_library() -> Any:
    """The module `rabitqlib`, imported when it is first needed: not every machine can.

    Raises:
        ConfigError: this one cannot; says why.
    """
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in loader.supported_instruction_sets():
        raise ConfigError("no index can be a graph here: rabitqlib needs a processor with AVX2")
    try:
        return importlib.import_module("rabitqlib")
    except ImportError as error:
        raise ConfigError(f"no index can be a graph here: rabitqlib cannot be imported ({error})") from error


def degree_of(spec: IndexSpec) -> int:
    """Edges of every row of a graph."""
    return int(spec.factory.removeprefix(GRAPH))


def has_graph(spec: IndexSpec, num_rows: int) -> bool:
    """Whether a segment of so many rows is given a graph; else it is searched exactly."""
    return spec.is_graph and num_rows > max(MIN_ROWS, degree_of(spec))


def bytes_per_row(spec: IndexSpec, dim: int) -> int:
    """What a graph takes, in memory as on the disk: a row's key, and of every edge its end, code and two factors."""
    return 4 * dim + degree_of(spec) * (4 + 8 * math.ceil(dim / 64) + 8)


class Graph:
    """The graph of one segment. Any number of threads may search it.

    Args:
        keys: float32 [n, D], in memory or memory-mapped.
        index: a SymqgIndex over them.
    """

    def __init__(self, keys: np.ndarray, index: Any) -> None:
        self._keys, self._index = keys, index

    @classmethod
    def build(cls, spec: IndexSpec, keys: np.ndarray) -> Graph:
        """A graph over keys, float32 [n, D], more than its degree; by as many threads as FAISS has here.

        Raises:
            ConfigError: this machine has no library for it.
        """
        index = require_library().SymqgIndex(keys.shape[1], degree_of(spec))
        index.build(np.ascontiguousarray(keys, np.float32), _EF_CONSTRUCTION, num_threads=faiss.omp_get_max_threads())
        return cls(keys, index)

    @classmethod
    def load(cls, path: Path, keys: np.ndarray) -> Graph:
        """Read a graph over `keys`, float32 [n, D], into memory.

        Raises:
            ConfigError: this machine has no library for it.
            DatabaseError: the file is missing, damaged, or of other keys.
        """
        try:
            index = require_library().SymqgIndex.load(str(path))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise ConfigError(f"cannot read {path}: {error}") from error
            raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error
        if (index.num_points, index.dim) != keys.shape:
            raise DatabaseError(
                f"{path} is a graph over {index.num_points} keys of {index.dim} dimensions, the segment has "
                f"{keys.shape[0]} of {keys.shape[1]}: check it with `python -m retro_ray verify`"
            )
        return cls(keys, index)

    def save(self, path: Path) -> None:
        """Write it so that it appears whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            self._index.save(str(temporary))
            temporary.replace(path)
        except RuntimeError as error:
            raise OSError(f"cannot write {path} ({error}): is the disk full?") from error
        finally:
            temporary.unlink(missing_ok=True)

    @cached_property
    def exact(self) -> ExactKeys:
        """The same keys, for what the graph cannot answer."""
        return ExactKeys(self._keys)

    def candidates(self, queries: np.ndarray, num_rows: int, ef: int) -> Candidates:
        """The `num_rows` nearest rows that a walk finds, never fewer: where it does not get far enough, of all rows.

        Args:
            queries: float32 [Q, D].
            num_rows: how many, at most n.
            ef: rows to keep in view for 10 neighbours; more where more are wanted.
        """
        widening = max(0, num_rows - _ROWS_WHEN_TUNED) / _ROWS_FOR_AS_MANY_AGAIN
        beam = max(num_rows, math.ceil(ef * (1 + widening)))
        if beam * _EXACT_FROM >= len(self._keys):
            return self.exact.candidates(queries, num_rows)
        num_threads = max(1, min(faiss.omp_get_max_threads(), len(queries) // _QUERIES_PER_THREAD))
        try:
            found, _ = self._index.search_batch(queries, num_rows, beam, num_threads=num_threads)
        except RuntimeError:  # one of these queries reached fewer rows: edges need not lead everywhere
            if len(queries) == 1:
                return self.exact.candidates(queries, num_rows)
            middle = len(queries) // 2
            return Candidates.concatenate([self.candidates(half, num_rows, ef) for half in np.split(queries, [middle])])
        rows = found.astype(np.int64)
        distances = squared_distances(np.ascontiguousarray(queries, np.float32), self._keys, rows)
        return Candidates(distances, distances, rows, distances[:, -1])
