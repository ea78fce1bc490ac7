"""The tuner against what it must find: settings whose recall, measured anew, reaches the target."""

import dataclasses
import itertools
import sys

import faiss
import numpy as np
import pytest

from retro_ray.errors import ConfigError
from retro_ray.index import tune
from retro_ray.index.build import fill_index, num_training_keys, train_index
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.graph import Graph, bytes_per_row
from retro_ray.index.search import search_parts
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import IndexSpec, OperatingPoint
from retro_ray.index.tune import (
    NUM_NEIGHBOURS,
    FilledIndex,
    ask_parts,
    best_point,
    choose_family,
    exact_trial,
    families,
    in_turns,
    measure,
    sweep,
)

DIM = 24
TARGET = 0.9
GRAPH = "SymphonyQG32"
ENOUGH = 896
"""Bytes per chunk that a graph over 64 dimensions takes."""


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((60, DIM))
    return (centres[rng.integers(0, 60, 5200)] + rng.standard_normal((5200, DIM))).astype(np.float32)


def brute_force(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    squares = ((queries[:, None, :].astype(float) - keys[None].astype(float)) ** 2).sum(-1)
    return np.argsort(squares, axis=1)[:, :NUM_NEIGHBOURS]


def test_the_trial_knows_the_exact_neighbours(keys: np.ndarray) -> None:
    queries, rest = keys[:100], keys[100:2100]
    expected = brute_force(rest, queries)
    trial = exact_trial(queries, [(0, rest[:700]), (700, rest[700:701]), (701, rest[701:])])
    np.testing.assert_array_equal(np.sort(trial.neighbours), np.sort(expected))
    assert trial.recall(expected[:, ::-1]) == (1.0, 0.0)
    assert trial.recall(np.where(np.arange(NUM_NEIGHBOURS) < 4, expected, -1))[0] == pytest.approx(0.4)


def test_a_key_is_not_its_own_neighbour(keys: np.ndarray) -> None:
    rows = np.arange(5, 105)
    trial = exact_trial(keys[rows], [(0, keys[:2000])], own_ids=rows)
    assert not (trial.neighbours == rows[:, None]).any()
    np.testing.assert_array_equal(trial.excluded_ids, np.stack([rows, rows], axis=1))


def test_the_family_chosen_reaches_the_target(keys: np.ndarray) -> None:
    lines: list[str] = []
    queries, rest = keys[:300], keys[300:]
    factory, points = choose_family(rest, queries, len(rest), target_recall=TARGET, report=lines.append)
    best = best_point(points, TARGET)
    assert best is not None
    tried = {point.factory for point in points}
    assert tried.issuperset(families(len(rest), DIM))
    fewer_lists = tried.difference(families(len(rest), DIM))
    assert len(fewer_lists) == 3
    assert all("IVF32" in factory for factory in fewer_lists)
    assert len(lines) == len(tried)
    assert best.factory == factory
    # Measured anew, by brute force and without any part of the tuner.
    spec = IndexSpec(factory=factory, nprobe=best.nprobe, refine_factor=best.refine_factor)
    index = fill_index(train_index(spec, DIM, rest[: num_training_keys(spec, len(rest))]), [rest])
    shard = IndexShard(spec, rest, index)
    _, found = search_parts(queries, 10, spec, QueryEncoder(spec, index), ask_parts([(0, 1.0, shard)]))
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, brute_force(rest, queries), strict=True)])
    assert recall == pytest.approx(best.recall, abs=0.02)
    assert best.lower_recall < best.recall
    assert best.lower_recall >= TARGET


def test_a_budget_is_kept_or_refused(keys: np.ndarray) -> None:
    queries, rest = keys[:300], keys[300:2300]
    arguments = {"num_chunks": len(rest), "target_recall": 0.6}
    _, points = choose_family(rest, queries, **arguments)
    # Which are tried with fewer lists, too, depends on the machine's mood.
    always = [point for point in points if point.factory in families(len(rest), DIM) and point.lower_recall >= 0.6]
    budget = int(min(point.bytes_per_chunk for point in always)) + 1
    factory, points = choose_family(rest, queries, **arguments, bytes_per_chunk=budget)
    assert min(point.bytes_per_chunk for point in points if point.factory == factory) <= budget
    with pytest.raises(ConfigError, match=r"--target-recall 0\.6 within --bytes-per-chunk 1: the smallest tried takes"):
        choose_family(rest, queries, **arguments, bytes_per_chunk=1)


@pytest.fixture(scope="module")
def long_keys() -> np.ndarray:
    """In 64 dimensions, from which on a graph is offered."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((60, 64))
    return (centres[rng.integers(0, 60, 5200)] + rng.standard_normal((5200, 64))).astype(np.float32)


@pytest.fixture
def only_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph, and one family of codes."""
    offered = families(5000, 64)
    assert offered[0] == GRAPH
    assert GRAPH not in families(5000, 32)
    monkeypatch.setattr(tune, "families", lambda num_chunks, dim: [GRAPH, "IVF64,SQ8"])


@pytest.mark.usefixtures("only_two")
def test_a_graph_is_measured_beside_codes(long_keys: np.ndarray) -> None:
    queries, rest = long_keys[:200], long_keys[200:]
    lines: list[str] = []
    _, points = choose_family(
        rest, queries, 10**6, target_recall=TARGET, bytes_per_chunk=ENOUGH, num_parts=2, report=lines.append
    )
    of_graph = [point for point in points if point.factory == GRAPH]
    assert {point.bytes_per_chunk for point in of_graph} == {bytes_per_row(IndexSpec(factory=GRAPH), 64)}
    assert {point.refine_factor for point in of_graph} == {1.0}
    assert [point.nprobe for point in of_graph] == sorted({point.nprobe for point in of_graph})
    best = best_point(of_graph, TARGET)
    assert best is not None
    assert "IVF32,SQ8" in {point.factory for point in points}, "a graph has no lists to halve"
    assert len(lines) == 3


def test_a_graph_keeps_its_name_in_a_larger_database(long_keys: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "families", lambda num_chunks, dim: [GRAPH])
    factory, _ = choose_family(long_keys[200:], long_keys[:200], 10**6, target_recall=TARGET, bytes_per_chunk=ENOUGH)
    assert factory == GRAPH


@pytest.mark.usefixtures("only_two")
@pytest.mark.parametrize("budget", [None, ENOUGH - 1])
def test_a_graph_that_nothing_was_granted_for_is_not_built(
    long_keys: np.ndarray, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    monkeypatch.setattr(Graph, "build", None)
    lines: list[str] = []
    factory, points = choose_family(
        long_keys[200:], long_keys[:200], 5000, target_recall=TARGET, bytes_per_chunk=budget, report=lines.append
    )
    assert "SQ8" in factory
    assert GRAPH not in {point.factory for point in points}
    assert lines[0] == "SymphonyQG32: not tried, it takes 896 bytes per chunk (--bytes-per-chunk)"


@pytest.mark.usefixtures("only_two")
def test_a_machine_without_the_library_has_the_other_families(
    long_keys: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rabitqlib", None)
    lines: list[str] = []
    factory, _ = choose_family(
        long_keys[200:], long_keys[:200], 5000, target_recall=TARGET, bytes_per_chunk=ENOUGH, report=lines.append
    )
    assert "SQ8" in factory
    assert "rabitqlib cannot be imported" in lines[0]


def test_a_target_out_of_reach_is_refused(long_keys: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "families", lambda num_chunks, dim: ["IVF64,PQ4x4fs"])
    monkeypatch.setattr(tune, "_MAX_CANDIDATES", 10)
    with pytest.raises(ConfigError, match=r"no index reaches --target-recall 0.999: lower it, or set 1"):
        choose_family(long_keys[200:], long_keys[:200], 5000, target_recall=0.999)


def test_segments_are_tuned_as_one_index(keys: np.ndarray) -> None:
    """The recall of a setting does not depend on how the keys are divided."""
    queries, rest = keys[:200], keys[200:]
    spec = IndexSpec(factory="IVF64,PQ12x4fs", nprobe=6, refine_factor=4)
    codec = train_index(spec, DIM, rest)
    measured = []
    for cuts in ([0, len(rest)], [0, 10, 1500, len(rest)]):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            index = fill_index(faiss.clone_index(codec), [rest[start:stop]])
            parts.append((start, (stop - start) / len(rest), IndexShard(spec, rest[start:stop], index)))
        trial = exact_trial(queries, [(start, rest[start:stop]) for start, stop in itertools.pairwise(cuts)])
        index = FilledIndex(spec.factory, 1.0, len(rest), QueryEncoder(spec, codec), parts)
        measured.append(measure(index, spec.nprobe, spec.refine_factor, trial).recall)
    assert measured[0] == measured[1] > 0.8


def test_a_sweep_finds_settings_that_reach_the_target(keys: np.ndarray) -> None:
    queries, rest = keys[:200], keys[200:]
    points = sweep(FilledIndex.fill("IVF64,PQ12x4fs", rest, num_parts=3), exact_trial(queries, [(0, rest)]), TARGET)
    assert [point.nprobe for point in points] == sorted({point.nprobe for point in points})
    assert sum(point.lower_recall >= TARGET for point in points) >= 1
    assert best_point(points, TARGET) is not None


def test_the_fastest_points_are_timed_again(keys: np.ndarray) -> None:
    """No other point changes, and of these nothing but the speed."""
    queries, rest = keys[:100], keys[100:]
    index, trial = FilledIndex.fill("IVF64,PQ12x4fs", rest, num_parts=2), exact_trial(queries, [(0, rest)])
    settings = (1, 1.0), (8, 8.0), (12, 8.0), (16, 8.0)
    points = [measure(index, nprobe, refine_factor, trial) for nprobe, refine_factor in settings]
    too_fast = [dataclasses.replace(point, queries_per_s=1e12) for point in points]
    assert points[0].lower_recall < TARGET < points[1].lower_recall
    [(same, timed)] = in_turns([(index, too_fast)], too_fast[:3], trial, TARGET)
    assert same is index
    assert [timed[0], timed[3]] == [too_fast[0], too_fast[3]], "one misses the target, one is not eligible"
    for before, after in zip(points[1:3], timed[1:3], strict=True):
        assert 0 < after.queries_per_s < 1e12
        assert dataclasses.replace(after, queries_per_s=before.queries_per_s) == before


def test_the_best_point_is_the_fastest_that_surely_reaches_the_target() -> None:
    def point(recall: float, lower: float, speed: float) -> OperatingPoint:
        return OperatingPoint(
            factory="f",
            nprobe=1,
            refine_factor=1,
            num_chunks=1,
            recall=recall,
            lower_recall=lower,
            queries_per_s=speed,
            bytes_per_chunk=1,
        )

    points = [point(0.99, 0.98, 10), point(0.96, 0.951, 30), point(0.955, 0.949, 50)]
    assert best_point(points, 0.95) == points[1]
    assert best_point(points[2:], 0.95) is None
