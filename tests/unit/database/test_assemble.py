"""Assembling partitions: what is empty, what was done before, and a fair sample of the keys."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retro_ray.database.arrow_rows import fixed_size_lists, write_rows
from retro_ray.database.assemble import key_blocks, sample_keys
from retro_ray.database.format import keys_schema
from tests.unit.database.corpora import Pages, make_document, split_of


def pages_of(folder: Path, num_documents: int, num_shards: int = 2, share: float = 0.0) -> Pages:
    documents = [make_document(f"{number}", 3 + 5 * number) for number in range(num_documents)]
    pages = Pages(folder / "pages", [documents], split_of([d.id for d in documents], num_shards, share))
    pages.write()
    return pages


def test_nothing_is_held_out(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6)
    assert set(pages.assemble(tmp_path / "b1")) == {"shard-00000", "shard-00001"}
    assert not (tmp_path / "b1" / "validation").exists()


def test_fewer_documents_than_shards(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 2, num_shards=40)
    partitions = pages.assemble(tmp_path / "b1")
    assert sorted(partitions) == [f"shard-{shard:05d}" for shard in range(len(partitions))]
    assert sum(partition.num_documents for partition in partitions.values()) == 2


def test_an_assembled_partition_is_not_assembled_again(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6)
    first = pages.assemble(tmp_path / "b1")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert pages.assemble(tmp_path / "b1") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == stamps


def test_killed_between_its_files_a_partition_is_assembled_again(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6)
    first = pages.assemble(tmp_path / "b1")
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")}
    for left in ("partition.json", "documents.arrow"):
        (tmp_path / "b1" / "shard-00000" / left).unlink()
    assert pages.assemble(tmp_path / "b1") == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")} == contents


def test_a_missing_page_ends_the_assembly_and_leaves_no_torn_file(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6, num_shards=1)
    next(pages.folder.rglob("*-page-*.parquet")).unlink()
    with pytest.raises(FileNotFoundError):
        pages.assemble(tmp_path / "b1")
    assert [path for path in (tmp_path / "b1").rglob("*") if path.is_file()] == []


def write_keys(path: Path, keys: np.ndarray) -> Path:
    write_rows(path, keys_schema(keys.shape[1]), [pa.table({"key": fixed_size_lists(keys, pa.float32())})])
    return path


def test_key_blocks_are_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_ray.database.assemble._KEYS_PER_BLOCK", 4)
    keys = np.arange(30, dtype=np.float32).reshape(10, 3)
    blocks = list(key_blocks(write_keys(tmp_path / "keys.arrow", keys)))
    assert [len(block) for block in blocks] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), keys)


def test_a_sample_is_of_all_shards_alike(tmp_path: Path) -> None:
    sizes = [10, 0, 500, 90]
    keys = np.arange(sum(sizes), dtype=np.float32)[:, None] * np.ones(2, np.float32)
    parts = np.split(keys, np.cumsum(sizes)[:-1])
    paths = [write_keys(tmp_path / f"{i}.arrow", part) for i, part in enumerate(parts)]
    drawn = sample_keys(paths, 300, seed=0)[:, 0]
    assert len(np.unique(drawn)) == 300
    counts = np.histogram(drawn, bins=[0, 10, 510, 600])[0]
    np.testing.assert_allclose(counts, [5, 250, 45], atol=16)
    np.testing.assert_array_equal(sample_keys(paths, 300, seed=0)[:, 0], drawn)
    assert set(sample_keys(paths, 300, seed=1)[:, 0]) != set(drawn)
    np.testing.assert_array_equal(sample_keys(paths, 10_000, seed=0), keys)
