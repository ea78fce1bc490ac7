"""Where a document goes depends on its id, the seed and the settings, and no shard is empty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.database.split import VALIDATION, Split, document_hash
from tests.unit.building.corpora import split_of

names_strategy = st.lists(st.text(max_size=6), min_size=1, max_size=40, unique=True)


@given(
    names=names_strategy,
    num_shards=st.integers(1, 50),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 2**63),
)
def test_every_document_has_a_place_and_no_shard_is_empty(
    names: list[str], num_shards: int, share: float, seed: int
) -> None:
    split = split_of(names, num_shards, share, seed)
    places = [split.partition_of(name) for name in names]
    shards = set(places) - {VALIDATION}
    assert shards == set(split.partitions[:-1])
    assert 1 <= len(shards) <= min(num_shards, len(names))
    assert split.partitions[-1] == VALIDATION


@given(names=names_strategy, seed=st.integers(0, 2**32))
def test_a_place_does_not_depend_on_order_or_other_documents(names: list[str], seed: int) -> None:
    split = split_of(names, 3, 0.3, seed)
    assert split_of(names[::-1], 3, 0.3, seed) == split
    more = split_of([*names, "one", "more"], 3, 0.3, seed)
    for name in names:
        if split.validation_share and len(more.shard_numbers) == len(split.shard_numbers):
            assert more.partition_of(name) == split.partition_of(name)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_the_share_and_the_shards_are_about_even(share: float) -> None:
    names = [f"document {i}" for i in range(20_000)]
    split = split_of(names, 4, share)
    places = np.array([split.partition_of(name) for name in names])
    assert np.mean(places == VALIDATION) == pytest.approx(share, abs=0.01)
    for shard in split.partitions[:-1]:
        assert np.mean(places == shard) == pytest.approx((1 - share) / 4, abs=0.012)


def test_another_seed_holds_out_others() -> None:
    names = [f"document {i}" for i in range(2000)]
    held_out = [
        {n for n in names if s.partition_of(n) == VALIDATION} for s in (split_of(names, 2, 0.2, i) for i in (0, 1))
    ]
    both = len(held_out[0] & held_out[1]) / len(held_out[0])
    assert both == pytest.approx(0.2, abs=0.06)


@given(names=st.lists(st.text(max_size=6), min_size=1, max_size=3, unique=True), seed=st.integers(0, 2**32))
def test_a_tiny_corpus_is_never_all_held_out(names: list[str], seed: int) -> None:
    split = split_of(names, 2, 0.99, seed)
    assert any(split.partition_of(name) != VALIDATION for name in names)


def test_hashes_do_not_change_between_versions() -> None:
    """A database that is built further must split alike."""
    assert document_hash("a document") == 18383076448087490940
    places = [Split(0.5, 7, seed, tuple(range(7))).partition_of("a document") for seed in range(4)]
    assert places == ["shard-00004", "validation", "validation", "validation"]
