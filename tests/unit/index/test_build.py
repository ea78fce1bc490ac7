"""Index files appear whole or not at all."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retro_ray.database.format import IndexSpec
from retro_ray.index.build import fill_index, read_index, train_index, write_index

KEYS = np.random.default_rng(0).standard_normal((50, 8), np.float32)


def make_index() -> faiss.Index:
    return fill_index(train_index(IndexSpec(factory="Flat"), 8, KEYS), [KEYS])


def test_an_index_survives_the_disk(tmp_path: Path) -> None:
    write_index(make_index(), tmp_path / "index.faiss")
    np.testing.assert_array_equal(read_index(tmp_path / "index.faiss").reconstruct_n(0, 50), KEYS)
    faiss.write_index(make_index(), str(tmp_path / "by FAISS"))
    assert (tmp_path / "index.faiss").read_bytes() == (tmp_path / "by FAISS").read_bytes()


def test_a_full_disk_is_an_error_and_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What /dev/full refuses is refused at the file's closing: an index this small fits the buffer."""
    path = tmp_path / "index.faiss"
    write_index(make_index(), path)
    before = path.read_bytes()
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened(Path("/dev/full"), mode))
    with pytest.raises(OSError, match="No space left"):
        write_index(make_index(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
