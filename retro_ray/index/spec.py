"""What an index is: its kind, how it is searched, and what that was measured to give."""

from __future__ import annotations

import math
from dataclasses import dataclass

GRAPH = "SymphonyQG"
"""Factory strings of graphs begin with it (graph.py)."""


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """How every segment is searched: what its index is, and search-time parameters."""

    factory: str
    """A factory string of FAISS's, or GRAPH and the graph's degree, as in "SymphonyQG32"."""
    nprobe: int = 0
    """Inverted lists visited per query; 0 for an exact index. Of a graph: rows kept in view while a query walks through
    it for 10 neighbours, what the literature calls ef."""
    refine_factor: float = 1.0
    """Candidates per neighbour asked for whose distances are computed from the keys themselves; 1 for a graph."""

    @property
    def is_exact(self) -> bool:
        return self.factory == "Flat"

    @property
    def is_graph(self) -> bool:
        return self.factory.startswith(GRAPH)

    @property
    def has_codec(self) -> bool:
        """Whether the indexes of all segments are made from one that was trained."""
        return not (self.is_exact or self.is_graph)

    @property
    def file_name(self) -> str:
        return "graph.symqg" if self.is_graph else "index.faiss"

    def num_candidates(self, k: int) -> int:
        """How many rows, nearest by their codes, have their distances computed for `k` neighbours."""
        return max(k, math.ceil(self.refine_factor * k))


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What one setting of an index was measured to give, on held-out queries."""

    factory: str
    nprobe: int
    refine_factor: float
    num_chunks: int
    """Keys that were searched: a sample of the database's, or all of them."""
    recall: float
    """Share of the 10 exact nearest neighbours that are found."""
    lower_recall: float
    """What it is at least, with a probability of 95 %."""
    queries_per_s: float
    """In batches, on the machine that built the database."""
    bytes_per_chunk: float
    """In memory, the keys beside it not counted; a graph holds a copy of its own."""
