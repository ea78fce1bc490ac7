"""Shards as actors on a real Ray cluster: shared, restarted when they die, and never silently wrong."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from retro_ray.database.store import Database
from retro_ray.errors import RetrievalError
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.retrieval.shard_actor import shard_actor, stop_shard_actors
from retro_ray.retrieval.sharded import ShardedRetriever
from tests.fakes import write_tiny_database
from tests.unit.retrieval.indexed import with_indexes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
K = 5


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


def pid_of(database: Database, shard: int) -> int:
    return ray.get(shard_actor(database, shard).__ray_call__.remote(lambda server: os.getpid()))


def assert_equal(found: NeighbourSet, expected: NeighbourSet) -> None:
    for field in ("distances", "chunk_ids", "tokens", "mask"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert found.documents == expected.documents
    assert found.missing_shards == ()


def test_retrievers_share_the_actors(database: Database, queries: np.ndarray, expected: NeighbourSet) -> None:
    first, second = ShardedRetriever(database), ShardedRetriever(Database.open(database.directory.parent))
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


def test_queries_too_large_for_a_message(database: Database) -> None:
    many = np.random.default_rng(0).standard_normal((4000, 8), np.float32)
    found, local = ShardedRetriever(database).search_ids(many, 3), LocalRetriever.open(database).search_ids(many, 3)
    np.testing.assert_array_equal(found[0], local[0])
    np.testing.assert_array_equal(found[1], local[1])


@pytest.mark.parametrize("death", ["crash", "kill and restart", "kill for good"])
def test_a_dead_actor_costs_no_query(
    database: Database, queries: np.ndarray, expected: NeighbourSet, death: str
) -> None:
    retriever = ShardedRetriever(database)
    before = pid_of(database, 1)
    if death == "crash":
        os.kill(before, signal.SIGKILL)
    else:
        ray.kill(shard_actor(database, 1), no_restart=death == "kill for good")
    assert_equal(retriever.search(queries, K), expected)
    assert pid_of(database, 1) != before
    assert_equal(ShardedRetriever(database).search(queries, K), expected)


def test_a_slow_shard_is_named_with_the_setting(
    database: Database, queries: np.ndarray, expected: NeighbourSet
) -> None:
    pid = pid_of(database, 0)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RetrievalError, match=r"shard 0 of 2 .*timeout_s=0\.5 passed"):
            ShardedRetriever(database, timeout_s=0.5).search(queries, K)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert_equal(ShardedRetriever(database).search(queries, K), expected)


def test_a_search_that_fails_is_an_error_of_its_shard(database: Database) -> None:
    with pytest.raises(RetrievalError, match=r"shard 0 of 2 .*the search failed") as caught:
        ShardedRetriever(database).search(np.zeros((1, 5), np.float32), K)
    assert "\n" not in str(caught.value)


def test_a_damaged_shard_is_named_and_served_once_it_is_mended(tmp_path: Path) -> None:
    """The actor that cannot load it ends, and is not started for ever."""
    database = with_indexes(write_tiny_database(tmp_path, num_shards=2))
    path = database.directory / database.manifest.segments[1].keys
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(bytes(flipped))
    queries = database.segments[0].keys[:3]
    retriever = ShardedRetriever(database, num_attempts=2)
    with pytest.raises(RetrievalError) as caught:
        retriever.search(queries, K)
    message = str(caught.value)
    assert "\n" not in message
    assert "shard 1 of 2" in message
    assert f"{path} has SHA-256" in message
    path.write_bytes(content)
    assert_equal(retriever.search(queries, K), LocalRetriever.open(database).search(queries, K))
    stop_shard_actors(database.directory)


def test_only_the_actors_of_a_home_and_of_other_versions_are_stopped(
    database: Database, queries: np.ndarray, expected: NeighbourSet, tmp_path: Path
) -> None:
    other = with_indexes(write_tiny_database(tmp_path, num_shards=1))
    ShardedRetriever(database).wait_until_ready()
    ShardedRetriever(other).wait_until_ready()
    pids = [pid_of(database, shard) for shard in range(2)]
    assert stop_shard_actors(other.directory, except_version=other.manifest.version) == 0
    assert stop_shard_actors(other.directory, except_version="another") == 1
    assert stop_shard_actors(other.directory) == 0
    assert [pid_of(database, shard) for shard in range(2)] == pids
