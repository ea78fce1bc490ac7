"""A graph lists near rows at their exact distances, in any batch; a file of it is whole, or refused."""

import copy
import os
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.index import graph as graph_module
from retro_ray.index.build import index_segment
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.graph import Graph, bytes_per_row, has_graph, require_library
from retro_ray.index.keys import write_keys
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import IndexSpec
from retro_ray.index.tune import NUM_NEIGHBOURS
from tests.unit.index.parts import Parts

DIM = 64
SPEC = IndexSpec(factory="SymphonyQG32", nprobe=60)
RNG = np.random.default_rng(0)
CENTRES = 2 * RNG.standard_normal((40, DIM))
KEYS = (CENTRES[RNG.integers(0, 40, 3000)] + RNG.standard_normal((3000, DIM))).astype(np.float32)
QUERIES = (KEYS[::50] + 0.3 * RNG.standard_normal((60, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph.build(SPEC, KEYS)


def exact_neighbours(k: int) -> np.ndarray:
    squares = ((QUERIES[:, None].astype(float) - KEYS[None].astype(float)) ** 2).sum(-1)
    return np.argsort(squares, axis=1)[:, :k]


def recall(found: np.ndarray) -> float:
    return float((found[:, :, None] == exact_neighbours(found.shape[1])[:, None]).any(axis=1).mean())


def assert_equal(found: Candidates, expected: Candidates) -> None:
    for name in ("coarse", "distances", "ids", "hidden_from"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_walk_lists_near_rows_at_their_exact_distances(graph: Graph) -> None:
    found = graph.candidates(QUERIES, 10, 60)
    assert recall(found.ids) > 0.9
    assert all(len(set(row)) == 10 for row in found.ids)
    exact = ((QUERIES[:, None].astype(float) - KEYS[found.ids].astype(float)) ** 2).sum(-1)
    np.testing.assert_allclose(found.distances, exact, rtol=1e-5)
    np.testing.assert_array_equal(found.coarse, found.distances)
    np.testing.assert_array_equal(found.hidden_from, found.distances[:, -1])


def test_more_rows_in_view_find_more(graph: Graph) -> None:
    few, many = (recall(graph.candidates(QUERIES, 10, ef).ids) for ef in (10, 150))
    assert few < many > 0.97
    listed = [recall(graph.candidates(QUERIES, num_rows, 30).ids[:, :10]) for num_rows in (14, 60)]
    assert listed[0] < listed[1], "where more rows are listed, more are kept in view"


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_answer_depends_neither_on_the_batch_nor_on_threads(graph: Graph, batch: int, num_threads: int) -> None:
    queries = np.tile(QUERIES, (3, 1))
    together = graph.candidates(queries, 10, 40)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        parts = [graph.candidates(queries[start : start + batch], 10, 40) for start in range(0, len(queries), batch)]
    finally:
        faiss.omp_set_num_threads(before)
    assert_equal(Candidates.concatenate(parts), together)


def test_what_a_query_excludes_does_not_change_the_answers_of_others(graph: Graph) -> None:
    """Nor do theirs change its own; and what is passed over makes room for as many."""
    own = np.arange(0, 3000, 50)
    excluded = np.stack([np.maximum(own - 25, 0), own + 24], axis=1)
    excluded[::2] = -1
    parts = _whole(graph)
    together = parts.search(QUERIES, 10, excluded)
    for query in range(0, 60, 7):
        alone = parts.search(QUERIES[query : query + 1], 10, excluded[query : query + 1])
        np.testing.assert_array_equal(alone[0][0], together[0][query])
        np.testing.assert_array_equal(alone[1][0], together[1][query])
    assert not ((together[1] >= excluded[:, :1]) & (together[1] <= excluded[:, 1:]) & (excluded[:, :1] >= 0)).any()
    np.testing.assert_array_equal(together[1][::2], parts.search(QUERIES, 10)[1][::2])


def _whole(graph: Graph, deleted: np.ndarray | None = None) -> Parts:
    """A database of one segment, that is not built a second time."""
    parts = Parts(SPEC, None, KEYS[:0])
    parts._shards, parts._num_rows = [(0, IndexShard(SPEC, KEYS, graph, deleted))], len(KEYS)
    return parts


def test_where_a_walk_ends_early_all_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clusters far apart: no edge need lead from one to the other."""
    monkeypatch.setattr(graph_module, "_EXACT_FROM", 1)
    rng = np.random.default_rng(1)
    keys = (0.01 * rng.standard_normal((64, DIM))).astype(np.float32)
    keys[:32] += 100
    graph = next(graph for _ in range(100) if _falls_apart(graph := Graph.build(SPEC, keys)))
    found = graph.candidates(keys, 60, 60)
    assert all(len(set(row)) == 60 for row in found.ids)
    assert (np.sort(found.distances, axis=1)[:, 0] == 0).all()


def _falls_apart(graph: Graph) -> bool:
    """Which edges there are is drawn."""
    try:
        graph._index.search_batch(graph._keys, 60, 60)
    except RuntimeError as error:
        return "could not produce k results" in str(error)
    return False


def test_a_wide_walk_gives_way_to_comparing_all(graph: Graph) -> None:
    found = graph.candidates(QUERIES, 10, 3000)
    assert_equal(found, graph.exact.candidates(QUERIES, 10))
    assert recall(found.ids) == 1


def test_many_deleted_and_many_wanted(graph: Graph) -> None:
    deleted = np.ones(len(KEYS), bool)
    deleted[::100] = False
    parts = _whole(graph, deleted)
    for k in (5, 30, 3000):
        distances, ids = parts.search(QUERIES, k)
        assert (ids[ids >= 0] % 100 == 0).all()
        assert ((ids >= 0).sum(axis=1) == min(30, k)).all()
        assert (np.diff(distances[:, :30], axis=1) >= 0).all()


def test_the_walk_for_ten_neighbours_is_the_one_that_is_tuned() -> None:
    assert Wanted(NUM_NEIGHBOURS).of_part(1.0) == graph_module._ROWS_WHEN_TUNED


def test_a_shard_searched_with_other_parameters_leaves_the_first_as_it_was(graph: Graph) -> None:
    shard = IndexShard(IndexSpec(factory=SPEC.factory, nprobe=10), KEYS, graph)
    prepared = QueryEncoder(SPEC, None).prepare(QUERIES)
    before = shard.candidates(prepared, 10)
    wider = shard.searched_as(IndexSpec(factory=SPEC.factory, nprobe=3000)).candidates(prepared, 10)
    assert recall(wider.ids) == 1 > recall(before.ids)
    assert_equal(shard.candidates(prepared, 10), before)


# Files. ---------------------------------------------------------------------------------------------------------


def test_a_file_makes_the_same_graph_and_takes_what_is_told(graph: Graph, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.npy", [KEYS], *KEYS.shape)
    graph.save(tmp_path / "graph.symqg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.symqg", "keys.npy"]
    size = (tmp_path / "graph.symqg").stat().st_size
    assert size == pytest.approx(len(KEYS) * bytes_per_row(SPEC, DIM), rel=0.001)
    prepared = QueryEncoder(SPEC, None).prepare(QUERIES)
    for mmap in (False, True):
        shard = IndexShard.open(SPEC, tmp_path / "keys.npy", tmp_path / "graph.symqg", mmap=mmap)
        assert_equal(shard.candidates(prepared, 12), IndexShard(SPEC, KEYS, graph).candidates(prepared, 12))


@pytest.mark.parametrize("dim", [100, 384])
def test_what_a_row_takes(dim: int, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((500, dim), np.float32)
    Graph.build(SPEC, keys).save(tmp_path / "graph")
    assert (tmp_path / "graph").stat().st_size / 500 == pytest.approx(bytes_per_row(SPEC, dim), rel=0.01)


def test_a_small_segment_has_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_keys(tmp_path / "keys.npy", [KEYS[:300]], 300, DIM)
    assert not index_segment(SPEC, None, tmp_path / "keys.npy", tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
    monkeypatch.setattr(graph_module, "MIN_ROWS", 299)
    assert index_segment(SPEC, None, tmp_path / "keys.npy", tmp_path / "graph")
    assert Graph.load(tmp_path / "graph", KEYS[:300]).candidates(QUERIES, 5, 9).ids.shape == (60, 5)
    monkeypatch.setattr(graph_module, "MIN_ROWS", 0)
    assert [has_graph(SPEC, num_rows) for num_rows in (0, 32, 33)] == [False, False, True]
    assert not has_graph(IndexSpec(factory="Flat"), 10**6)


def test_a_torn_or_foreign_file_is_refused(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "graph.symqg"
    graph.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-1], whole + b"x", bytes(1000), os.urandom(1000), b"\xff" * 1000):
        path.write_bytes(content)
        with pytest.raises(DatabaseError, match=r"cannot read .*graph.symqg \(.*verify"):
            Graph.load(path, KEYS)
    path.unlink()
    with pytest.raises(DatabaseError, match="does not exist"):
        Graph.load(path, KEYS)
    path.write_bytes(whole)
    with pytest.raises(DatabaseError, match="a graph over 3000 keys of 64 dimensions, the segment has 2999 of 64"):
        Graph.load(path, KEYS[1:])


def test_a_full_disk_is_an_error_and_leaves_the_old_graph(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "graph.symqg"
    graph.save(path)
    before = path.read_bytes()
    path.with_name(f"{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="is the disk full"):
        graph.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_library_nothing_is_built_or_read_and_that_is_said(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph.save(tmp_path / "graph.symqg")
    monkeypatch.setitem(sys.modules, "rabitqlib", None)
    with pytest.raises(ConfigError, match="no index can be a graph here: rabitqlib cannot be imported"):
        Graph.build(SPEC, KEYS)
    with pytest.raises(ConfigError, match=r"cannot read .*graph.symqg: no index can be a graph here"):
        Graph.load(tmp_path / "graph.symqg", KEYS)
    monkeypatch.undo()
    monkeypatch.setattr(graph_module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(graph_module.loader, "supported_instruction_sets", lambda: {"SSE2"})
    with pytest.raises(ConfigError, match="needs a processor with AVX2"):
        require_library()


def test_a_graph_can_be_shared_by_copies(graph: Graph) -> None:
    """As a shard is copied when what is deleted changes."""
    shard = IndexShard(SPEC, KEYS, graph)
    other = copy.copy(shard)
    deleted = np.zeros(len(KEYS), bool)
    deleted[exact_neighbours(1)[:, 0]] = True
    other.set_deleted(deleted)
    prepared = QueryEncoder(SPEC, None).prepare(QUERIES)
    assert recall(shard.candidates(prepared, 10).ids) > 0.9
    assert not np.isin(other.candidates(prepared, 10).ids, np.flatnonzero(deleted)).any()
