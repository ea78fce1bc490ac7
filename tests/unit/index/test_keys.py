from pathlib import Path

import numpy as np
import pytest

from retro_ray.errors import DatabaseError
from retro_ray.index.keys import key_blocks, read_keys, sample_keys, write_keys


def saved(path: Path, keys: np.ndarray) -> Path:
    write_keys(path, [keys[:3], keys[3:]], *keys.shape)
    return path


def test_key_blocks_are_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_ray.index.keys._KEYS_PER_BLOCK", 4)
    keys = np.arange(30, dtype=np.float32).reshape(10, 3)
    blocks = list(key_blocks(saved(tmp_path / "keys.npy", keys)))
    assert [len(block) for block in blocks] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), keys)


def test_a_sample_is_of_all_shards_alike(tmp_path: Path) -> None:
    sizes = [10, 0, 500, 90]
    keys = np.arange(sum(sizes), dtype=np.float32)[:, None] * np.ones(2, np.float32)
    parts = np.split(keys, np.cumsum(sizes)[:-1])
    paths = [saved(tmp_path / f"{i}.npy", part) for i, part in enumerate(parts)]
    drawn = sample_keys(paths, 300, seed=0)[:, 0]
    assert len(np.unique(drawn)) == 300
    counts = np.histogram(drawn, bins=[0, 10, 510, 600])[0]
    np.testing.assert_allclose(counts, [5, 250, 45], atol=16)
    np.testing.assert_array_equal(sample_keys(paths, 300, seed=0)[:, 0], drawn)
    assert set(sample_keys(paths, 300, seed=1)[:, 0]) != set(drawn)
    np.testing.assert_array_equal(sample_keys(paths, 10_000, seed=0), keys)


def test_fewer_keys_than_announced_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 keys were announced"):
        write_keys(tmp_path / "keys.npy", [np.zeros((3, 2), np.float32)], 4, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "keys.npy", np.ones((10, 4), np.float32))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DatabaseError, match=r"keys\.npy"):
        read_keys(path)
