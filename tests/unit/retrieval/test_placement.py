"""Replicas of one shard sit on different nodes as long as there are enough."""

from collections import Counter
from itertools import product

import pytest

from retro_ray.retrieval.placement import choose_node

NODES = ["c", "a", "b"]


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_replicas_of_a_shard_go_apart_and_shards_go_round(num_replicas: int) -> None:
    placed = {
        (shard, replica): choose_node(shard, replica, NODES, ())
        for shard, replica in product(range(6), range(num_replicas))
    }
    for shard in range(6):
        assert len({placed[shard, replica] for replica in range(num_replicas)}) == num_replicas
    assert set(Counter(placed.values()).values()) == {2 * num_replicas}


def test_all_who_start_replicas_agree() -> None:
    assert choose_node(4, 1, ["a", "b", "c"], ()) == choose_node(4, 1, ["c", "b", "a"], ())


def test_nodes_of_other_replicas_are_avoided() -> None:
    """Replica 0 was on a node that is gone; what is left would put it beside replica 1."""
    wanted = choose_node(0, 0, ["b", "c"], ())
    other = "c" if wanted == "b" else "b"
    assert choose_node(0, 0, ["b", "c"], {wanted}) == other


def test_more_replicas_than_nodes_share() -> None:
    assert choose_node(0, 1, ["only"], {"only"}) == "only"
    assert {choose_node(0, replica, ["a", "b"], {"a", "b"}) for replica in range(4)} == {"a", "b"}
