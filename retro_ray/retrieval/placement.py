"""On which node a replica of a shard goes: not where another of the same shard is, as long as there is a choice."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def choose_node(shard: int, replica: int, nodes: Sequence[str], taken: Collection[str]) -> str:
    """A node for a replica.

    Shards go round the nodes, and the replicas of one go on from there: so all who start replicas
    agree on where they go, without asking each other.

    Args:
        shard: its number.
        replica: its number.
        nodes: ids of the nodes there are, at least one.
        taken: ids of those where other replicas of the shard are known to be.
    """
    in_order = sorted(nodes)
    start = (shard + replica) % len(in_order)
    in_order = in_order[start:] + in_order[:start]
    return next((node for node in in_order if node not in taken), in_order[0])
