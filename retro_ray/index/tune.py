"""Choosing an index by measurement: the fastest one that reaches a recall within a budget of memory.

Families of indexes are filled with keys of the database and searched with held-out queries, whose
exact neighbours are known. A wide search tells for every number of lists visited how many candidates
are needed; what reaches the target is timed, and the fastest once more, in turns. A graph has only one parameter to
choose. What was measured stays in the manifest as a curve.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from retro_ray.errors import ConfigError
from retro_ray.index.build import fill_index, num_lists_for, num_lists_of, num_training_keys, train_index, with_lists
from retro_ray.index.encoder import PreparedQueries, QueryEncoder
from retro_ray.index.exact import ExactKeys
from retro_ray.index.graph import MIN_DIM, Graph, bytes_per_row, has_graph, require_library
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Ask, Wanted, search_parts
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import GRAPH, IndexSpec, OperatingPoint

NUM_NEIGHBOURS = 10
"""Recall is measured at this many neighbours."""
NUM_QUERIES = 4_000
"""So many that the uncertainty of the recall costs little speed."""
MAX_TRIAL_KEYS = 131_072
"""Families are compared on so many random keys of the database; the chosen one is then measured on all."""
_GRAPH_DEGREE = 32
"""64 is no faster at the same recall, and takes twice the memory."""
_MAX_CANDIDATES = 320
_NPROBE_STEP = 1.5
_MIN_NPROBE, _MIN_EF = 4, 16
_NUM_TIMINGS = 3
_NUM_FINALISTS = 10
_NUM_WITH_FEWER_LISTS = 3
_NUM_TURNS = 5
_NUM_REACHING = 4
"""Points measured that reach the target: more lists and fewer candidates are faster only at first."""
_HOPELESS = 0.3
"""A family is given up where it is so much slower than the best one so far."""
_CONFIDENCE = 1.64
"""Standard errors by which a measured recall must pass the target: it holds with a probability of 95 %."""


def families(num_chunks: int, dim: int) -> list[str]:
    """Factory strings of indexes worth a trial, for keys of `dim` dimensions.

    A graph is fastest by far, and comes first: the others are then given up early. Of codes, product quantization in
    4 bits is scanned fastest; taking the first principal components before it makes the look-up tables smaller at the
    same quality. RaBitQ needs half the memory. 8-bit scalars need the most, and hardly any candidates.
    """
    lists = f"IVF{num_lists_for(num_chunks)}"
    found = [f"{GRAPH}{_GRAPH_DEGREE}"] if dim >= MIN_DIM else []
    for components in sorted({dim, 2 * dim // 3, dim // 2, dim // 3}, reverse=True):
        if components and components % 4 == 0:
            rotation = "" if components == dim else f"PCA{components},"
            found.append(f"{rotation}{lists},PQ{components // 2}x4fs")
    if dim % 4 == 0:
        found.append(f"{lists},PQ{dim // 4}x4fs")
    return [*found, f"{lists},RaBitQfs", f"{lists},SQ8"]


@dataclass(frozen=True)
class Trial:
    """Held-out queries and their exact neighbours among some keys."""

    queries: np.ndarray
    """float32 [Q, D]."""
    neighbours: np.ndarray
    """int64 [Q, k]: rows, or chunk_ids."""
    excluded_ids: np.ndarray | None = None
    """int64 [Q, 2]: each query's own row or chunk_id, first and last; None where queries are not among the keys."""

    def recall(self, found: np.ndarray) -> tuple[float, float]:
        """Mean share of the exact neighbours that are among `found`, int64 [Q, k], and its standard error."""
        hits = (found[:, :, None] == self.neighbours[:, None, :]).any(axis=1).mean(axis=1)
        return float(hits.mean()), float(hits.std() / math.sqrt(len(hits)))


def exact_trial(
    queries: np.ndarray, parts: Sequence[tuple[int, np.ndarray]], own_ids: np.ndarray | None = None
) -> Trial:
    """The exact neighbours of queries in some keys.

    Args:
        queries: float32 [Q, D].
        parts: of the database: id of the first row, and keys float32 [n, D], in memory or memory-mapped.
        own_ids: int64 [Q], where queries are keys themselves: not their own neighbours.
    """
    found = []
    for base, keys in parts:
        exact = ExactKeys(keys)
        distances, rows = exact.nearest(queries, min(NUM_NEIGHBOURS + 1, len(keys)))
        found.append((distances, rows + base))
    distances = np.concatenate([distances for distances, _ in found], axis=1)
    ids = np.concatenate([ids for _, ids in found], axis=1)
    excluded = None
    if own_ids is not None:
        distances = np.where(ids == own_ids[:, None], np.inf, distances)
        excluded = np.stack([own_ids, own_ids], axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
    return Trial(queries, np.take_along_axis(ids, order, 1), excluded)


Part = tuple[int, float, IndexShard]
"""A segment as it is searched: id of its first row, share of the database's chunks, index."""


@dataclass(frozen=True)
class FilledIndex:
    """An index over some keys, as it is searched."""

    factory: str
    bytes_per_chunk: float
    num_chunks: int
    encoder: QueryEncoder
    parts: Sequence[Part]

    @classmethod
    def fill(cls, factory: str, keys: np.ndarray, num_parts: int) -> FilledIndex:
        """Train and fill one on keys, float32 [n, D], in so many parts of about one size."""
        spec = IndexSpec(factory=factory)
        codec = None
        if spec.has_codec:
            codec = train_index(spec, keys.shape[1], keys[: num_training_keys(spec, len(keys))])
        bounds = np.linspace(0, len(keys), num_parts + 1).astype(int).tolist()
        parts, size = [], 0
        for start, stop in itertools.pairwise(bounds):
            own, index = keys[start:stop], None
            if codec is not None:
                index = fill_index(faiss.clone_index(codec), [own])
                size += len(faiss.serialize_index(index))
            elif has_graph(spec, len(own)):
                index = Graph.build(spec, own)
                size += bytes_per_row(spec, keys.shape[1]) * len(own)
            parts.append((start, len(own) / len(keys), IndexShard(spec, own, index)))
        return cls(factory, size / len(keys), len(keys), QueryEncoder(spec, codec), parts)

    def search(self, spec: IndexSpec, trial: Trial) -> tuple[float, np.ndarray]:
        """The seconds that all queries of a trial take, and what is found, int64 [Q, k]."""
        start = time.perf_counter()
        # The parameters of encoder and parts are another spec's.
        ask = ask_parts([(base, share, shard.searched_as(spec)) for base, share, shard in self.parts])
        _, ids = search_parts(trial.queries, NUM_NEIGHBOURS, spec, self.encoder, ask, trial.excluded_ids)
        return time.perf_counter() - start, ids


def choose_family(
    keys: np.ndarray,
    queries: np.ndarray,
    num_chunks: int,
    *,
    target_recall: float,
    bytes_per_chunk: int | None = None,
    num_parts: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[str, list[OperatingPoint]]:
    """The family to use for a database, and what was measured of all of them.

    The fastest are tried with half as many lists, too: which is better depends on the machine.

    Args:
        keys: float32 [n, D], a random sample of the database's keys.
        queries: float32 [Q, D], not among them.
        num_chunks: of the whole database.
        target_recall: at NUM_NEIGHBOURS neighbours.
        bytes_per_chunk: most that an index may hold in memory per chunk; None: any codes, but no graph.
        num_parts: to divide the keys into, so that a part is about as large as a shard of the database.
        report: told what was measured, line by line.

    Raises:
        ConfigError: no family reaches the target, or fits into `bytes_per_chunk` then.
    """
    trial = exact_trial(queries, [(0, keys)])
    swept: list[tuple[FilledIndex, list[OperatingPoint]]] = []

    def affordable() -> list[OperatingPoint]:
        points = [point for _, of_index in swept for point in of_index]
        return [point for point in points if bytes_per_chunk is None or point.bytes_per_chunk <= bytes_per_chunk]

    def try_family(factory: str) -> None:
        index = FilledIndex.fill(factory, keys, num_parts)
        fastest = best_point(affordable(), target_recall)
        points = sweep(index, trial, target_recall, 0.0 if fastest is None else _HOPELESS * fastest.queries_per_s)
        swept.append((index, points))
        best = best_point(points, target_recall)
        reached = "misses the target" if best is None else f"{best.queries_per_s:,.0f} queries/s"
        report(f"{factory}: {reached}, {index.bytes_per_chunk:.0f} bytes per chunk")

    for factory in families(len(keys), keys.shape[1]):
        if _is_graph(factory) and (why_not := _graph_problem(factory, keys.shape[1], bytes_per_chunk)) is not None:
            report(f"{factory}: not tried, {why_not}")
            continue
        try_family(factory)
    swept = in_turns(swept, affordable(), trial, target_recall)
    fastest = [factory for factory in fastest_families(affordable(), target_recall) if not _is_graph(factory)]
    for factory in fastest[:_NUM_WITH_FEWER_LISTS]:
        try_family(with_lists(factory, num_lists_for(len(keys)) // 2))
    swept = in_turns(swept, affordable(), trial, target_recall)
    best = best_point(affordable(), target_recall)
    points = [point for _, of_index in swept for point in of_index]
    if best is None and bytes_per_chunk is None:
        raise ConfigError(f"no index reaches --target-recall {target_recall:g}: lower it, or set 1 for an exact search")
    if best is None:
        smallest = min(point.bytes_per_chunk for point in points)
        raise ConfigError(
            f"no index reaches --target-recall {target_recall:g} within --bytes-per-chunk {bytes_per_chunk}: "
            f"the smallest tried takes {smallest:.0f}; lower the one or raise the other"
        )
    if _is_graph(best.factory):
        return best.factory, points
    share = num_lists_of(best.factory) / num_lists_for(len(keys))
    return with_lists(best.factory, round(share * num_lists_for(num_chunks))), points


def sweep(index: FilledIndex, trial: Trial, target_recall: float, give_up_below: float = 0.0) -> list[OperatingPoint]:
    """Recall and speed of one filled index over the lists visited and the candidates ranked.

    For each number of lists: the fewest candidates that reach the target, or where none do, as many
    as help. Of a graph: over the rows kept in view. Ends where more lists or rows only cost, or where it is slower than
    `give_up_below` queries/s.
    """
    points: list[OperatingPoint] = []
    is_graph = _is_graph(index.factory)

    def try_nprobe(nprobe: int) -> None:
        if is_graph:
            points.append(measure(index, nprobe, 1.0, trial))
            return
        wide = _wide_recall(index, trial, nprobe)
        passing = np.flatnonzero(wide >= target_recall)
        enough = passing[0] if len(passing) else np.flatnonzero(wide >= wide[-1] - 0.002)[0]
        num_candidates = max(NUM_NEIGHBOURS, int(enough) + 1)
        points.append(measure(index, nprobe, num_candidates / NUM_NEIGHBOURS, trial))

    for nprobe in _grid(_MIN_EF, index.num_chunks) if is_graph else _grid(_MIN_NPROBE, index.encoder.num_lists):
        try_nprobe(nprobe)
        num_reaching = len([point for point in points if point.lower_recall >= target_recall])
        if num_reaching >= _NUM_REACHING or points[-1].queries_per_s < give_up_below:
            break
    best = best_point(points, target_recall)
    if best is not None:
        for nprobe in _around(best.nprobe, [point.nprobe for point in points]):
            try_nprobe(nprobe)
    return sorted(points, key=lambda point: point.nprobe)


def measure(index: FilledIndex, nprobe: int, refine_factor: float, trial: Trial) -> OperatingPoint:
    """Recall and speed of one setting; the speed is that of the fastest of a few searches of all queries."""
    spec = IndexSpec(factory=index.factory, nprobe=nprobe, refine_factor=refine_factor)
    searches = [index.search(spec, trial) for _ in range(_NUM_TIMINGS)]
    recall, error = trial.recall(searches[0][1])
    return OperatingPoint(
        factory=spec.factory,
        nprobe=spec.nprobe,
        refine_factor=spec.refine_factor,
        num_chunks=index.num_chunks,
        recall=recall,
        lower_recall=recall - _CONFIDENCE * error,
        queries_per_s=len(trial.queries) / min(seconds for seconds, _ in searches),
        bytes_per_chunk=index.bytes_per_chunk,
    )


def in_turns(
    swept: Sequence[tuple[FilledIndex, list[OperatingPoint]]],
    eligible: Sequence[OperatingPoint],
    trial: Trial,
    target_recall: float,
) -> list[tuple[FilledIndex, list[OperatingPoint]]]:
    """The same points, the fastest eligible ones timed again, in turns: a machine changes its speed meanwhile."""
    # The fastest of every family first, then the second of each.
    fastest_first = sorted(eligible, key=lambda point: -point.queries_per_s)
    ranks: Counter[str] = Counter()
    ranked = []
    for point in fastest_first:
        if point.lower_recall >= target_recall:
            ranked.append((ranks[point.factory], point))
            ranks[point.factory] += 1
    finalists = [point for _, point in sorted(ranked, key=lambda pair: pair[0])][:_NUM_FINALISTS]
    seconds: dict[OperatingPoint, float] = dict.fromkeys(finalists, math.inf)
    for _ in range(_NUM_TURNS):
        for index, points in swept:
            for point in points:
                if point in seconds:
                    seconds[point] = min(seconds[point], index.search(spec_of(point), trial)[0])
    timed = {
        point: dataclasses.replace(point, queries_per_s=len(trial.queries) / least) for point, least in seconds.items()
    }
    return [(index, [timed.get(point, point) for point in points]) for index, points in swept]


def spec_of(point: OperatingPoint) -> IndexSpec:
    """What was measured there."""
    return IndexSpec(factory=point.factory, nprobe=point.nprobe, refine_factor=point.refine_factor)


def best_point(points: Sequence[OperatingPoint], target_recall: float) -> OperatingPoint | None:
    """The fastest point that surely reaches the target; None where none does."""
    reaching = [point for point in points if point.lower_recall >= target_recall]
    return max(reaching, key=lambda point: point.queries_per_s, default=None)


def fastest_families(points: Sequence[OperatingPoint], target_recall: float) -> list[str]:
    """Those that surely reach the target, the fastest first."""
    by_family = {point.factory: [other for other in points if other.factory == point.factory] for point in points}
    best = [point for of_family in by_family.values() if (point := best_point(of_family, target_recall)) is not None]
    return [point.factory for point in sorted(best, key=lambda point: -point.queries_per_s)]


def _wide_recall(index: FilledIndex, trial: Trial, nprobe: int) -> np.ndarray:
    """Lower bound of the recall with 1, 2, ... candidates, float64 [C]: from one search with many."""
    prepared = index.encoder.prepare(trial.queries, nprobe)
    # As many "neighbours" as candidates, ranked by their coarse distances, is what the cut goes by.
    parts = ask_parts(index.parts)(prepared, Wanted(_MAX_CANDIDATES), trial.excluded_ids)
    coarse = np.concatenate([part.coarse for part in parts], axis=1)
    ids = np.concatenate([part.ids for part in parts], axis=1)
    order = np.argsort(coarse, axis=1, kind="stable")[:, :_MAX_CANDIDATES]
    hits = (np.take_along_axis(ids, order, 1)[:, :, None] == trial.neighbours[:, None, :]).any(axis=2)
    found = hits.cumsum(axis=1) / trial.neighbours.shape[1]
    return found.mean(axis=0) - _CONFIDENCE * found.std(axis=0) / math.sqrt(len(found))


def _grid(least: int, most: int) -> list[int]:
    values = {min(most, round(least * _NPROBE_STEP**i)) for i in range(40)}
    return sorted(values)


def _around(nprobe: int, tried: Sequence[int]) -> list[int]:
    """Between a number of lists and those that were tried beside it, two on either side."""
    found = set()
    for other in (
        max((n for n in tried if n < nprobe), default=nprobe),
        min((n for n in tried if n > nprobe), default=nprobe),
    ):
        found |= {round(nprobe * (other / nprobe) ** share) for share in (1 / 3, 2 / 3)}
    return sorted(found - set(tried))


def _is_graph(factory: str) -> bool:
    return IndexSpec(factory=factory).is_graph


def _graph_problem(factory: str, dim: int, bytes_per_chunk: int | None) -> str | None:
    """Why a graph is not worth building for a trial; None: it is."""
    size = bytes_per_row(IndexSpec(factory=factory), dim)
    if bytes_per_chunk is None or size > bytes_per_chunk:
        return f"it takes {size:,} bytes per chunk (--bytes-per-chunk)"
    try:
        require_library()
    except ConfigError as error:
        return str(error)
    return None


def ask_parts(parts: Sequence[Part]) -> Ask:
    """Asks segments in this process."""

    def ask(queries: PreparedQueries, wanted: Wanted, excluded_ids: np.ndarray | None) -> list[Candidates]:
        return [
            shard.candidates(
                queries, wanted.of_part(share), None if excluded_ids is None else excluded_ids - base
            ).with_base(base)
            for base, share, shard in parts
        ]

    return ask
