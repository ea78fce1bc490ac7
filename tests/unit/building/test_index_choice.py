"""The way from filled segments to the spec in a manifest, on files as a build leaves them."""

from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.index_choice import (
    IndexAims,
    IndexChoice,
    choose_search,
    is_searched_exactly,
    train_codec,
)
from retro_ray.index.build import index_segment
from retro_ray.index.spec import IndexSpec
from tests.unit.building.partitions import write_partition

DIM = 16
AIMS = IndexAims(target_recall=0.8, bytes_per_chunk=None, seed=0)


@pytest.mark.parametrize("num_held_out", [0, 10, 400])
def test_from_keys_to_the_search_of_a_database(tmp_path: Path, num_held_out: int) -> None:
    """With a validation split, with one too small to measure by, and without one."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((40, DIM))
    keys = (centres[rng.integers(0, 40, 4400)] + rng.standard_normal((4400, DIM))).astype(np.float32)
    segments = [write_partition(tmp_path, "a", 0, keys[:1500]), write_partition(tmp_path, "b", 1500, keys[1500:4000])]
    validation = write_partition(tmp_path, "validation", -1, keys[4000 : 4000 + num_held_out]) if num_held_out else None
    codec = tmp_path / "codec.faiss"
    family = train_codec(tmp_path, segments, validation, AIMS, codec)
    for segment in segments:
        assert index_segment(family.spec, codec, tmp_path / segment.keys, tmp_path / segment.index(family.spec))
    choice = choose_search(tmp_path, segments, validation, AIMS, codec, family)
    assert choice.spec.factory == family.spec.factory
    assert choice.spec.nprobe >= 1
    chosen = [point for point in choice.curve if point.num_chunks == 4000 and point.nprobe == choice.spec.nprobe]
    assert chosen[-1].lower_recall >= AIMS.target_recall
    choice.write(tmp_path / "choice.json")
    assert IndexChoice.read(tmp_path / "choice.json") == choice
    assert IndexChoice(IndexSpec(factory="Flat")).curve == ()


@pytest.mark.parametrize(
    ("num_chunks", "dim", "target", "exactly"),
    [(60_000, 384, 0.95, True), (60_001, 384, 0.95, False), (60_001, 383, 0.95, True), (10**9, 384, 1.0, True)],
)
def test_small_databases_and_a_recall_of_one_are_searched_exactly(
    num_chunks: int, dim: int, target: float, exactly: bool
) -> None:
    assert is_searched_exactly(num_chunks, dim, target) == exactly
