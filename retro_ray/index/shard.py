"""One segment as it is searched: its codes or its graph, and its keys for exact distances to what these suggest."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retro_ray.index.build import read_index
from retro_ray.index.encoder import PreparedQueries
from retro_ray.index.exact import FAISS, ExactKeys, squared_distances
from retro_ray.index.graph import Graph
from retro_ray.index.keys import read_keys
from retro_ray.index.merge import Candidates, pad_columns
from retro_ray.index.spec import IndexSpec

_SELECT_FROM = 1024
"""From so many candidates on, FAISS itself passes over what is excluded: query by query, but without listing it."""
_MOST_PASSED_OVER = 4
"""Times as many rows of a graph at first, at most, for the sake of those that are excluded."""
_QUERIES_PER_SCAN = 1024
"""More bring FAISS nothing, and its tables for them take memory that the system hands out page by page."""


class IndexShard:
    """Candidates among the rows of one segment; row i is its i-th chunk.

    Args:
        spec: of the database's manifest.
        keys: float32 [n, D], in memory or memory-mapped; row i the key of chunk i.
        index: the codes of these keys, or a graph over them; None where they are searched exactly.
        deleted: bool [n], rows never to return; None: none.
    """

    def __init__(
        self,
        spec: IndexSpec,
        keys: np.ndarray,
        index: faiss.Index | Graph | None = None,
        deleted: np.ndarray | None = None,
    ) -> None:
        self._spec = spec
        self._keys = keys
        self._graph = index if isinstance(index, Graph) else None
        self._exact = ExactKeys(keys) if index is None else None
        # The lists alone: queries come transformed. The whole index is kept, as it owns them.
        self._index, self._lists = index, _inverted_lists(None if isinstance(index, Graph) else index)
        self.set_deleted(deleted)

    @classmethod
    def open(
        cls, spec: IndexSpec, keys: Path, index: Path | None, deleted: np.ndarray | None = None, mmap: bool = False
    ) -> IndexShard:
        """A segment's files. Where it has an index, its keys are memory-mapped in any case.

        Args:
            spec: of the database's manifest.
            keys: its keys.npy.
            index: its index.faiss or graph.symqg; None: the segment has none, and is searched exactly. Not read for an
                exact index.
            deleted: bool [n].
            mmap: map the keys that are searched exactly, too, and what of a compressed index FAISS can map: the lists
                of 4-bit codes it reads into memory in any case. So is a graph: it cannot be mapped.

        Raises:
            ConfigError: the index is a graph, and this machine has no library for it.
            DatabaseError: a file is missing or damaged.
        """
        mapped = read_keys(keys)
        if index is None or spec.is_exact:
            return cls(spec, mapped if mmap else np.array(mapped), None, deleted)
        return cls(spec, mapped, Graph.load(index, mapped) if spec.is_graph else read_index(index, mmap), deleted)

    @property
    def num_rows(self) -> int:
        return len(self._keys)

    def searched_as(self, spec: IndexSpec) -> IndexShard:
        """The same segment, searched with other parameters."""
        other = copy.copy(self)
        other._spec = spec
        return other

    def set_deleted(self, deleted: np.ndarray | None) -> None:
        """Replace what is not to be returned: bool [n], or None."""
        self._deleted = deleted if deleted is not None and deleted.any() else None
        self._num_live = self.num_rows if deleted is None else self.num_rows - int(np.count_nonzero(deleted))

    def candidates(
        self, queries: PreparedQueries, num_candidates: int, excluded_rows: np.ndarray | None = None
    ) -> Candidates:
        """The rows nearest by their codes, with exact distances.

        Args:
            queries: from the QueryEncoder of the codec this segment's index was made from.
            num_candidates: about how many to list.
            excluded_rows: int64 [Q, 2], first and last row to pass over, which may lie outside the segment; (-1, -1):
                none.

        Returns:
            Rows that are deleted or excluded are not listed; how many are listed then varies.
        """
        if not self._num_live or not num_candidates or not len(queries):
            nothing = np.full((len(queries), 0), np.inf, np.float32)
            hidden_from = np.full(len(queries), np.inf if not self._num_live else 0, np.float32)
            return Candidates(nothing, nothing, nothing.astype(np.int64), hidden_from)
        # Deleted rows take places, too.
        num_candidates = min(math.ceil(num_candidates * self.num_rows / self._num_live), self.num_rows)
        if excluded_rows is None or not self._spec.is_graph:
            return self._listed(queries, num_candidates, excluded_rows)
        # Each query for itself: with how many rows in view a graph is walked must not depend on the batch.
        first, last = np.maximum(excluded_rows[:, 0], 0), np.minimum(excluded_rows[:, 1], self.num_rows - 1)
        passed_over = np.maximum(last - first + 1, 0)
        widening = 1 + np.minimum(-(-passed_over // num_candidates), _MOST_PASSED_OVER)
        return _in_groups(
            widening,
            lambda times, members: self._listed(
                queries[members], min(int(times) * num_candidates, self.num_rows), excluded_rows[members]
            ),
        )

    def _listed(self, queries: PreparedQueries, num_candidates: int, excluded_rows: np.ndarray | None) -> Candidates:
        """`candidates` of so many rows, those that are passed over among them."""
        if num_candidates >= _SELECT_FROM and (self._deleted is not None or excluded_rows is not None):
            return self._selected(queries, num_candidates, excluded_rows)
        found = self._find(queries, num_candidates, None)
        passed = np.zeros(found.ids.shape, bool)
        if excluded_rows is not None:
            passed |= (found.ids >= excluded_rows[:, :1]) & (found.ids <= excluded_rows[:, 1:])
        if self._deleted is not None:
            passed |= self._deleted[found.ids]
        if not passed.any():
            return found
        return Candidates(
            np.where(passed, np.inf, found.coarse),
            np.where(passed, np.inf, found.distances),
            np.where(passed, -1, found.ids),
            found.hidden_from,
        )

    def _selected(self, queries: PreparedQueries, num_candidates: int, excluded_rows: np.ndarray | None) -> Candidates:
        """As `candidates`, one search for every range of excluded rows."""
        if excluded_rows is None:
            excluded_rows = np.full((len(queries), 2), -1, np.int64)

        def search(excluded: np.ndarray, members: np.ndarray) -> Candidates:
            first, last = excluded
            allowed = np.ones(self.num_rows, bool) if self._deleted is None else ~self._deleted
            allowed[max(0, first) : max(0, last + 1)] = False
            selector = FAISS.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
            return self._find(queries[members], num_candidates, selector)

        return _in_groups(excluded_rows, search)

    def _find(self, queries: PreparedQueries, num_candidates: int, selector: faiss.IDSelector | None) -> Candidates:
        if self._exact is not None:
            return self._exact.candidates(queries.keys, num_candidates, selector)
        if self._graph is not None:
            if selector is not None:
                return self._graph.exact.candidates(queries.keys, num_candidates, selector)
            return self._graph.candidates(queries.keys, num_candidates, self._spec.nprobe)
        coarse, rows = self._scan(queries, num_candidates, selector)
        coarse[rows < 0] = np.inf  # FAISS's own sign of an empty place differs between indexes
        distances = squared_distances(np.ascontiguousarray(queries.keys), self._keys, rows)
        hidden_from = np.where(num_candidates < self.num_rows, coarse[:, -1], np.float32(np.inf))
        return Candidates(coarse, distances, rows, hidden_from)

    def _scan(
        self, queries: PreparedQueries, num_candidates: int, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nearest by the codes of the lists to visit: coarse float32 [Q, C] and rows int64 [Q, C]."""
        coarse = np.empty((len(queries), num_candidates), np.float32)
        rows = np.empty((len(queries), num_candidates), np.int64)
        transformed, lists, list_distances = (
            np.ascontiguousarray(array) for array in (queries.transformed, queries.lists, queries.list_distances)
        )
        pointer, parameters = faiss.swig_ptr, _parameters(lists.shape[1], selector)
        for start in range(0, len(queries), _QUERIES_PER_SCAN):
            block = slice(start, start + _QUERIES_PER_SCAN)
            # The C++ method: FAISS's Python wrapper takes no search parameters here.
            self._lists.search_preassigned_c(
                len(transformed[block]),
                pointer(transformed[block]),
                num_candidates,
                pointer(lists[block]),
                pointer(list_distances[block]),
                pointer(coarse[block]),
                pointer(rows[block]),
                False,
                parameters,
            )
        return coarse, rows


def _in_groups(keys: np.ndarray, search: Callable[[Any, np.ndarray], Candidates]) -> Candidates:
    """The candidates of all queries from one search for all that have the same key.

    Args:
        keys: one per query, [Q, ...].
        search: given a key and which queries have it, int64 [G]; how many it lists may vary.
    """
    distinct, group_of = np.unique(keys, axis=0, return_inverse=True)
    groups = [np.flatnonzero(group_of.reshape(-1) == group) for group in range(len(distinct))]
    found = [search(key, members) for key, members in zip(distinct, groups, strict=True)]
    if len(found) == 1:
        return found[0]
    width = max(part.ids.shape[1] for part in found)
    padded = [
        Candidates(
            pad_columns(part.coarse, width, np.inf),
            pad_columns(part.distances, width, np.inf),
            pad_columns(part.ids, width, -1),
            part.hidden_from,
        )
        for part in found
    ]
    together, place = Candidates.concatenate(padded), np.argsort(np.concatenate(groups))
    return Candidates(
        together.coarse[place], together.distances[place], together.ids[place], together.hidden_from[place]
    )


def _inverted_lists(index: faiss.Index | None) -> Any:
    return None if index is None else faiss.downcast_index(faiss.extract_index_ivf(index))


def _parameters(nprobe: int, selector: faiss.IDSelector | None) -> faiss.SearchParameters:
    return FAISS.SearchParametersIVF(nprobe=nprobe, sel=selector)
