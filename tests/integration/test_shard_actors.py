"""Shards as actors on a real Ray cluster: shared, replicated, restarted when they die, and never silently wrong."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayError

from retro_ray.config import RetrievalConfig
from retro_ray.database.format import write_manifest
from retro_ray.database.store import Database
from retro_ray.errors import RetrievalError
from retro_ray.index import graph as graph_module
from retro_ray.index.encoder import PreparedQueries
from retro_ray.index.search import Wanted
from retro_ray.index.spec import IndexSpec
from retro_ray.ray_session import NAMESPACE
from retro_ray.retrieval.following import CommitId
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.messages import CandidateRequest
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.retrieval.shard_actor import ReplicaName, refresh_shard_actors, stop_shard_actors
from retro_ray.retrieval.sharded import ShardedRetriever
from tests.fakes import write_tiny_database
from tests.unit.retrieval.homes import write_home
from tests.unit.retrieval.indexed import with_indexes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
K = 5
TWO = RetrievalConfig(num_replicas=2)
PARTIAL = RetrievalConfig(policy="partial")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Database]:
    database = with_indexes(write_tiny_database(tmp_path_factory.mktemp("home"), num_shards=2))
    yield database
    stop_shard_actors(database.directory)


@pytest.fixture(scope="module")
def queries(database: Database) -> np.ndarray:
    return np.concatenate([store.keys[::7] for store in database.segments])


@pytest.fixture(scope="module")
def expected(database: Database, queries: np.ndarray) -> NeighbourSet:
    return LocalRetriever.open(database).search(queries, K)


def test_actors_search_graphs_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments of two shards: two have graphs, one is too small for any."""
    monkeypatch.setattr(graph_module, "MIN_ROWS", 100)
    keys = np.random.default_rng(0).standard_normal((1500, 64)).astype(np.float32)
    home = write_home(tmp_path, [[1 + number % 90] for number in range(1500)], keys, [700, 1450], [0, 1, 1])
    few_in_view = IndexSpec(factory="SymphonyQG32", nprobe=12)
    database = with_indexes(home.database, index=few_in_view)
    graphs = [segment.index(few_in_view) in database.manifest.files for segment in database.manifest.segments]
    assert graphs == [True, True, False]
    excluded = np.full((150, 2), -1)
    excluded[:70] = np.arange(70)[:, None] * 10 + [0, 9]
    expected = LocalRetriever.open(database).search_ids(keys[::10], K, excluded)
    exact = LocalRetriever.open(with_flat_index(database), pinned=True).search_ids(keys[::10], K, excluded)
    assert 0.5 < (expected[1] == exact[1]).mean() < 1, "graphs are searched, which do not find all"
    with closing_actors(database):
        found = ShardedRetriever(database).search_ids(keys[::10], K, excluded)
        alone = ShardedRetriever(database).search_ids(keys[:1], K, excluded[:1])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(alone, expected, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def with_flat_index(database: Database) -> Database:
    return Database(database.directory, replace(database.manifest, index=IndexSpec(factory="Flat")))


@contextmanager
def closing_actors(database: Database) -> Iterator[None]:
    try:
        yield
    finally:
        stop_shard_actors(database.directory)


def actor_of(database: Database, shard: int, replica: int = 0) -> Any:
    return ray.get_actor(str(ReplicaName(database.directory, shard, replica)), namespace=NAMESPACE)


def pid_of(database: Database, shard: int, replica: int = 0) -> int:
    """Of the process of an actor that lives or is being started again."""
    while True:
        try:
            return ray.get(actor_of(database, shard, replica).__ray_call__.remote(lambda actor: os.getpid()))
        except ActorUnavailableError:
            time.sleep(0.1)


DEATHS: dict[str, Callable[[Any, int], None]] = {
    "crash": lambda actor, pid: os.kill(pid, signal.SIGKILL),
    "kill and restart": lambda actor, pid: ray.kill(actor, no_restart=False),
    "kill for good": lambda actor, pid: ray.kill(actor, no_restart=True),
}


def die(database: Database, shard: int, death: str = "crash") -> int:
    """Returns once the process is gone; which it was."""
    pid = pid_of(database, shard)
    DEATHS[death](actor_of(database, shard), pid)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    return pid


def assert_equal(found: NeighbourSet, expected: NeighbourSet) -> None:
    for field in ("distances", "chunk_ids", "tokens", "mask"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert found.documents == expected.documents
    assert found.missing_shards == ()


def test_retrievers_share_the_actors(database: Database, queries: np.ndarray, expected: NeighbourSet) -> None:
    first, second = ShardedRetriever(database), ShardedRetriever(database.directory.parent)
    first.wait_until_ready()
    pids = [pid_of(database, shard) for shard in range(2)]
    assert_equal(first.search(queries, K), expected)
    assert_equal(second.search(queries, K), expected)
    assert [pid_of(database, shard) for shard in range(2)] == pids
    assert len({*pids, os.getpid()}) == 3
    excluded = np.full((len(queries), 2), (3, 20))
    for found, local in zip(
        second.search_ids(queries, K, excluded),
        LocalRetriever.open(database).search_ids(queries, K, excluded),
        strict=True,
    ):
        np.testing.assert_array_equal(found, local)


def test_more_queries_than_one_message_holds(database: Database) -> None:
    many = np.random.default_rng(0).standard_normal((4000, 8), np.float32)
    found, local = ShardedRetriever(database).search_ids(many, 3), LocalRetriever.open(database).search_ids(many, 3)
    np.testing.assert_array_equal(found[0], local[0])
    np.testing.assert_array_equal(found[1], local[1])


def connected(database: Database, queries: np.ndarray, config: RetrievalConfig | None = None) -> ShardedRetriever:
    """One whose next small search goes over connections to the actors, and not through Ray."""
    retriever = ShardedRetriever(database, config)
    lines = retriever._transport._lines
    while len(lines) < database.manifest.num_shards or not all(line._free for line in lines.values()):
        retriever.search(queries, K)
    return retriever


def test_small_searches_do_not_pass_through_ray(
    database: Database, queries: np.ndarray, expected: NeighbourSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = connected(database, queries)
    monkeypatch.setattr(ray, "get", None)
    monkeypatch.setattr(ray, "put", None)
    for _ in range(3):
        assert_equal(retriever.search(queries, K), expected)


def test_some_calls_pass_through_ray_and_others_do_not(
    database: Database, queries: np.ndarray, expected: NeighbourSet
) -> None:
    retriever = connected(database, queries)
    without = retriever._transport._lines[1, 0]
    without._free.clear()
    without._not_before = float("inf")
    assert_equal(retriever.search(queries, K), expected)
    die(database, 0)
    assert_equal(retriever.search(queries, K), expected)


def test_an_actor_that_died_while_nobody_asked_costs_no_answer(
    database: Database, queries: np.ndarray, expected: NeighbourSet
) -> None:
    """The connection to it is gone, but it is back: `partial` has nothing to leave out."""
    retriever = connected(database, queries, PARTIAL)
    before = die(database, 1)
    assert pid_of(database, 1) != before
    ShardedRetriever(database).wait_until_ready()
    for _ in range(3):
        assert_equal(retriever.search(queries, K), expected)


@pytest.mark.parametrize("death", DEATHS)
def test_a_dead_actor_costs_no_query(
    database: Database, queries: np.ndarray, expected: NeighbourSet, death: str
) -> None:
    """Policy `wait`, without a second replica: the query waits until the actor is back."""
    retriever = connected(database, queries)
    before = die(database, 1, death)
    assert_equal(retriever.search(queries, K), expected)
    assert pid_of(database, 1) != before
    assert_equal(ShardedRetriever(database).search(queries, K), expected)


@pytest.mark.parametrize("death", DEATHS)
def test_with_two_replicas_no_query_even_waits(
    database: Database, queries: np.ndarray, expected: NeighbourSet, death: str
) -> None:
    """Policy `fail`: it would be an error if no replica lived."""
    ShardedRetriever(database, TWO).wait_until_ready()
    pid_of(database, 1, 1)  # it lives
    retriever = connected(database, queries, RetrievalConfig(num_replicas=2, policy="fail"))
    die(database, 1, death)
    for _ in range(20):
        assert_equal(retriever.search(queries, K), expected)


def test_partial_names_the_missing_shard_until_it_is_back(
    database: Database, queries: np.ndarray, expected: NeighbourSet
) -> None:
    retriever = ShardedRetriever(database, PARTIAL)
    assert_equal(retriever.search(queries, K), expected)
    die(database, 1)
    found = retriever.search(queries, K)
    assert found.missing_shards == (1,)
    of_the_other = np.isin(found.chunk_ids, np.arange(database.segments[0].num_chunks)) | (found.chunk_ids < 0)
    assert of_the_other.all()
    with pytest.raises(RetrievalError, match=r"shards \[1\] .*policy to wait"):
        retriever.search_ids(queries, K)  # there is no place in its answer to say what is missing
    retriever.wait_until_ready()
    while (found := retriever.search(queries, K)).missing_shards:
        pass
    assert_equal(found, expected)


def test_fail_names_shard_cause_and_way_out(database: Database, queries: np.ndarray) -> None:
    retriever = ShardedRetriever(database, RetrievalConfig(policy="fail"))
    retriever.search(queries, K)
    die(database, 0)
    with pytest.raises(RetrievalError, match=r"shard 0 of 2 .*its actor died.*policy \(fail\)") as caught:
        retriever.search(queries, K)
    assert "\n" not in str(caught.value)


def test_a_slow_shard_is_named_with_the_setting(
    database: Database, queries: np.ndarray, expected: NeighbourSet
) -> None:
    ShardedRetriever(database).search(queries, K)
    impatient = RetrievalConfig(policy="fail", timeout_s=0.5)
    known = connected(database, queries, impatient)
    pid = pid_of(database, 0)
    os.kill(pid, signal.SIGSTOP)
    try:
        for retriever in (known, ShardedRetriever(database, impatient)):
            with pytest.raises(RetrievalError, match=r"shard 0 of 2 .*timeout_s=0\.5 passed"):
                retriever.search(queries, K)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert_equal(ShardedRetriever(database).search(queries, K), expected)


def test_a_search_that_fails_is_an_error_of_its_shard(database: Database) -> None:
    retriever = ShardedRetriever(database)
    nothing = np.zeros(1, np.float32)
    nonsense = CandidateRequest(CommitId(0, ""), PreparedQueries(nothing, nothing, nothing, nothing), Wanted(5), None)
    # Both shards fail, and either may be the first to say so.
    with pytest.raises(RetrievalError, match=r"shard [01] of 2 .*the search failed: .*tuple index") as caught:
        retriever._shards.ask(nonsense, 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(RetrievalError, match=r"\(1, 5\) .* 8 dimensions"):
        retriever.search(np.zeros((1, 5), np.float32), K)


def test_a_damaged_shard_is_named_and_served_once_it_is_mended(tmp_path: Path) -> None:
    """The actor that cannot load it ends, and is not started for ever."""
    database = with_indexes(write_tiny_database(tmp_path, num_shards=2))
    path = database.directory / database.manifest.segments[1].keys
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(bytes(flipped))
    queries = database.segments[0].keys[:3]
    retriever = ShardedRetriever(database)
    with pytest.raises(RetrievalError) as caught:
        retriever.search(queries, K)
    message = str(caught.value)
    assert "\n" not in message
    assert "shard 1 of 2" in message
    assert f"{path} has SHA-256" in message
    path.write_bytes(content)
    try:
        found = retriever.search(queries, K)
    except RetrievalError:  # the actor that was being started meanwhile had still read the damaged file
        found = retriever.search(queries, K)
    assert_equal(found, LocalRetriever.open(database).search(queries, K))
    stop_shard_actors(database.directory)


def test_a_commit_shows_in_the_next_search_without_a_restart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [[1 + d] * 6 for d in range(8)]
    keys = rng.standard_normal((16, 3)).astype(np.float32)
    (tmp_path / "database").mkdir()
    home = write_home(tmp_path / "database", documents, keys, [4, 6], [0, 1, 1])
    home.show(2)
    retriever = ShardedRetriever(tmp_path)
    assert (retriever.search(keys, 16).chunk_ids < 12).all()
    pids = [pid_of(home.database, shard) for shard in range(2)]
    for commit in (lambda: home.show(3), lambda: home.delete([(0, 1), (2, 0)])):
        database = commit()
        found = retriever.search(keys, 16)
        assert found.generation == database.manifest.generation
        assert_equal(found, LocalRetriever.open(database).search(keys, 16))
    assert not np.isin(found.chunk_ids, [2, 3, 12, 13]).any()
    assert [pid_of(home.database, shard) for shard in range(2)] == pids
    # Told of a commit, they load it before anybody asks; a shard that is no more is stopped.
    everything = replace(home.manifest.segments[2], shard=0)
    home.commit(num_shards=1, segments=(*home.manifest.segments[:1], everything))
    assert refresh_shard_actors(home.directory) == 1
    with pytest.raises((ValueError, RayError)):
        pid_of(home.database, 1)
    assert_equal(retriever.search(keys, 16), LocalRetriever.open(home.database).search(keys, 16))
    stop_shard_actors(home.directory)


def test_a_build_is_searched_before_it_is_committed(
    database: Database, queries: np.ndarray, expected: NeighbourSet, tmp_path: Path
) -> None:
    """Through actors of its own, which do not follow, and end with it; others' are left alone."""
    other = write_home(tmp_path, [[1] * 6, [2] * 6], np.eye(4, 3, dtype=np.float32), [1], [0, 1])
    pinned = ShardedRetriever(other.database, pinned=True)
    asked = np.eye(4, 3, dtype=np.float32)
    before = pinned.search(asked, 4)
    assert sorted(before.chunk_ids[0]) == [0, 1, 2, 3]
    following = ShardedRetriever(other.database)
    write_manifest(other.directory, replace(other.manifest, generation=2, segments=other.manifest.segments[:1]))
    assert_equal(pinned.search(asked, 4), before)
    assert sorted(following.search(asked, 4).chunk_ids[0]) == [-1, -1, 0, 1]
    assert stop_shard_actors(other.directory, pinned_only=True) == 2
    assert stop_shard_actors(other.directory) == 2
    assert stop_shard_actors(other.directory) == 0
    assert_equal(ShardedRetriever(database).search(queries, K), expected)
