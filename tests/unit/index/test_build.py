"""Index files appear whole or not at all."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retro_ray.index.build import fill_index, read_index, train_index, write_index
from retro_ray.index.spec import IndexSpec

KEYS = np.random.default_rng(0).standard_normal((700, 8), np.float32)
SPEC = IndexSpec(factory="PCA6,IVF16,PQ3x4fs", nprobe=4, refine_factor=4)


def make_index() -> faiss.Index:
    return fill_index(train_index(SPEC, 8, KEYS), [KEYS])


def contents(index: faiss.Index) -> bytes:
    return faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize("mmap", [False, True])
def test_an_index_survives_the_disk(tmp_path: Path, mmap: bool) -> None:
    write_index(make_index(), tmp_path / "index.faiss")
    assert contents(read_index(tmp_path / "index.faiss", mmap)) == contents(make_index())
    faiss.write_index(make_index(), str(tmp_path / "by FAISS"))
    assert (tmp_path / "index.faiss").read_bytes() == (tmp_path / "by FAISS").read_bytes()


@pytest.mark.parametrize("factory", ["PCA6,IVF16,PQ3x4fs", "IVF16,PQ4x4fs", "IVF16,SQ8", "IVF16,RaBitQfs"])
def test_codes_do_not_depend_on_blocks(factory: str) -> None:
    """Nor on which other keys a segment has: sharded search rests on it."""
    codec = train_index(IndexSpec(factory=factory), 8, KEYS)
    whole, blocks = (
        fill_index(faiss.clone_index(codec), parts)
        for parts in ([KEYS], [KEYS[:3], KEYS[3:40], KEYS[40:41], KEYS[41:]])
    )
    assert whole.ntotal == blocks.ntotal == len(KEYS)
    assert contents(whole) == contents(blocks)


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
